"""Increments, the positions that they sum to, and how both get into a model: what every other package stands on.

Start with `increments.py` (where increments come from) and `positions.py` (what they become); both stand alone.

    one layer       stream.py, on visible_tokens.py (which tokens a sum runs over) and rotation.py (rotary modules)
    one pass        forward_pass.py (what layers share), kv_cache.py (what outlives the pass), hook_points.py
    one model       attach.py and position_streams.py, on find_attention.py, per_head.py, head_trial.py, devices.py
    around it       model_state.py (what is given back), transformer_lens_internals.py (what is not documented)
"""
