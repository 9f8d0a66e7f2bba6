"""Texts to tokens and back: /tokenize in vLLM's and TGI's form, /detokenize."""
