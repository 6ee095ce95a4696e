"""Images of the guides, at the addresses that these name."""
pictures = dict(
    # The pipelines guide's.
    astronaut='https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/'
              'sdxl-text2img.png',
    astronaut_mask='https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/'
                   'sdxl-inpaint-mask.png',
    bench='https://raw.githubusercontent.com/CompVis/latent-diffusion/main/data/inpainting_examples/'
          'overture-creations-5sI6fQgYIuo.png',
    bench_mask='https://raw.githubusercontent.com/CompVis/latent-diffusion/main/data/inpainting_examples/'
               'overture-creations-5sI6fQgYIuo_mask.png',
    # The T2I-Adapter guide's.
    outline='https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/'
            'controlnet_training/conditioning_image_1.png',
    # Refiners'.
    castle='https://refine.rs/guides/adapting_sdxl/german-castle.jpg',
    castle_depth='https://refine.rs/guides/adapting_sdxl/zoe-depth-map-german-castle.png')
