"""What differs between models, kept to what truly differs: finding experts and routers, loading
processors."""
