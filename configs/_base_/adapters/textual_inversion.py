"""A new token for prompts, in both text encoders; it starts as the word 'object'."""
textual_inversion = dict(type='TextualInversion', token='<thing>', num_vectors=1, init='object', weights=None)
