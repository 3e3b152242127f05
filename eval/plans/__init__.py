"""Plans of formats at equal bytes, on measured accuracy and bytes moved: ``python -m eval plans MODEL --plan ...``."""
