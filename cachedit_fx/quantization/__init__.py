"""Quantization of linear layers by torchao.

kinds.py   the kinds, and the devices and shapes that each needs
layers.py  which layers of a module are quantized
selection.py  a caller's words as layers, each shape tried
apply.py   `quantize` and `dequantize`
copies.py  quantized copies beside the weights, for precision by step
report.py  the report of `quantize`
files.py   `save_quantized` and `load_quantized`
"""
