"""Subject and style: "Use a different prompt for each text-encoder" of the pipelines guide."""
_base_ = ['sdxl_text_to_image.py']
infer_cfg = dict(prompt_2='Van Gogh painting')
