"""A fresh T2I-Adapter, as wide as the base asks for."""
t2i_adapter = dict(type='T2IAdapter', condition_key='conditioning_image', weights=None, scale=1.0)
