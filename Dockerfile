# CUDA's development image (nvcc builds the kernels and Transformer Engine's torch extension); the rest comes from PyPI at
# pinned versions. An image that has torch and Transformer Engine 2.18 or newer, such as NVIDIA's PyTorch image, keeps its own:
#   docker build -t megatron-ssu .
#   docker build -t megatron-ssu --build-arg BASE=nvcr.io/nvidia/pytorch:TAG .
#   docker run --gpus all --ipc host megatron-ssu make demo
ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv git make g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron-ssu
COPY . .
RUN python3 containers/install.py
ENV PATH=/opt/megatron-ssu/.venv/bin:$PATH CUDA_DEVICE_MAX_CONNECTIONS=1
