# NGC's PyTorch image brings CUDA, NCCL, torch, Apex and Transformer Engine; the rest is installed beside them.
#   docker build -t megatron-ssu .
#   docker run --gpus all --ipc host megatron-ssu make demo
FROM nvcr.io/nvidia/pytorch:25.06-py3
WORKDIR /opt/megatron-ssu
COPY . .
# The image's own torch stays: what is installed here must fit it. The virtual environment sees the image's packages.
RUN python -m venv --system-site-packages .venv \
    && .venv/bin/pip install --no-cache-dir "setuptools>=68" wheel ninja pybind11 \
    && .venv/bin/pip freeze --all | grep -iE '^(torch|transformer[-_]engine|apex|triton|numpy)==' > /tmp/keep.txt || true
RUN .venv/bin/pip install --no-cache-dir --no-build-isolation -c /tmp/keep.txt -e ".[test]" && touch .venv/.ready
ENV PATH=/opt/megatron-ssu/.venv/bin:$PATH CUDA_DEVICE_MAX_CONNECTIONS=1
