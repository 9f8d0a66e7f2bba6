"""Quantised linears of safetensors files: AWQ, GPTQ and compressed-tensors, one file each."""
