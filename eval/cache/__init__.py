"""Cache policies and predictions on recorded routes: ``python -m eval cache TRACE... --fit TRACE... --out FILE``."""
