_base_ = ['./stable_diffusion_xl_t2i_adapter_canny.py']
# Needs the package controlnet_aux, which needs torchvision (docs/data.md). On a GPU as in the depth config.
condition = dict(
    _delete_=True, type='Preprocessor', function='controlnet_aux:LineartDetector.from_pretrained',
    init=dict(pretrained_model_or_path='lllyasviel/Annotators'),
    call=dict(detect_resolution=384, image_resolution='$resolution'), device='cpu')
