"""How long a layer's experts take to quantize, batched and one by one."""
