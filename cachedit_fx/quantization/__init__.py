"""Quantization of linear layers by torchao.

kinds.py   the kinds, and the devices and shapes that each needs
layers.py  which layers of a module are quantized
apply.py   `quantize` and `dequantize`
report.py  the report of `quantize`
files.py   `save_quantized` and `load_quantized`
"""
