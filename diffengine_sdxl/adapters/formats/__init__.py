"""Files of adapters as people have them, and back: the only place where keys are renamed."""
