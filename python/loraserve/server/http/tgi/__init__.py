"""TGI's and LoRAX' routes."""
