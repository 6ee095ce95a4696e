"""A T2I-Adapter from soft edges, computed from the images by PidiNet; needs the package controlnet_aux."""
_base_ = ['stable_diffusion_xl_t2i_adapter_canny.py']
# controlnet_aux needs torchvision (docs/data.md). On a GPU as in the depth config.
condition = dict(
    _delete_=True, type='Preprocessor', function='controlnet_aux:PidiNetDetector.from_pretrained',
    init=dict(pretrained_model_or_path='lllyasviel/Annotators'),
    call=dict(detect_resolution='$resolution', image_resolution='$resolution', apply_filter=True), device='cpu')
test_evaluator = [dict(type='SoftEdgeSSIM', extractor='$condition')]
