"""A T2I-Adapter from depth maps, computed from the images by a depth model of transformers."""
_base_ = ['stable_diffusion_xl_t2i_adapter_canny.py']
# `model`: any depth model that transformers loads. On the CPU, in the loader's workers; on a GPU set device='cuda' and
# train_dataloader.num_workers=0.
condition = dict(_delete_=True, type='Depth', model='Intel/dpt-hybrid-midas', device='cpu')
test_evaluator = [dict(type='DepthRMSE', extractor='$condition')]
