"""The machine under the trainer, and the only folder that names or replaces private parts of megatron-core and torch.

`private_names` lists them. Nothing here imports from the rest of the package but `errors`.
"""
