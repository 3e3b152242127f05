from helpers.interpreted import device

__all__ = ["device"]
