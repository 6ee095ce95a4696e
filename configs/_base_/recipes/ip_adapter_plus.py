"""An IP-Adapter plus on SDXL base 1.0, trained like an IP-Adapter."""
_base_ = ['ip_adapter.py']
model = dict(adapters=dict(ip=dict(architecture='plus')))
