"""The GPU fast path: prefill with streamed layers, decode as one CUDA graph per batch size."""
