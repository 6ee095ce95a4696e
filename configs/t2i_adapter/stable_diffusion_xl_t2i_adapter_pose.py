"""A T2I-Adapter from body poses, computed from the images by OpenPose; needs the package controlnet_aux."""
_base_ = ['stable_diffusion_xl_t2i_adapter_canny.py']
# controlnet_aux needs torchvision (docs/data.md); OpenPose's licence allows no commercial use.
# Give it photographs of people: in drawings few poses are found. On a GPU as in the depth config.
condition = dict(
    _delete_=True, type='Preprocessor', function='controlnet_aux:OpenposeDetector.from_pretrained',
    init=dict(pretrained_model_or_path='lllyasviel/Annotators'),
    call=dict(detect_resolution=512, image_resolution='$resolution'), device='cpu')
test_evaluator = [dict(type='PoseAccuracy')]
