"""Which of the PyTorch system's tensors is which of our parameters? One table for each network, read both ways.

Left stands the PyTorch name, right the path in our parameter tree, both in full; `weights/translate.py` says what the
letters count. Tables keep the order of PyTorch's modules, by which its optimisers number the parameters.
"""

_TIME = {
    "t_embedder.mlp.0.weight": "time_embedding/in/kernel",
    "t_embedder.mlp.0.bias": "time_embedding/in/bias",
    "t_embedder.mlp.2.weight": "time_embedding/out/kernel",
    "t_embedder.mlp.2.bias": "time_embedding/out/bias",
}
_LABEL = {"y_embedder.embedding_table.weight": "label_embedding/table"}
_PATCH = {
    "s_embedder.proj.weight": "patch_embedding/kernel",
    "s_embedder.proj.bias": "patch_embedding/bias",
}
_QUERY = {
    "x_embedder.embedder.0.weight": "decoder/query/kernel",
    "x_embedder.embedder.0.bias": "decoder/query/bias",
}
_BLOCKS = {
    "blocks.{i}.norm1.weight": "transformer/layers/block/attention_norm/scale",
    "blocks.{i}.attn.qkv.weight": "transformer/layers/block/attention/qkv/kernel",
    "blocks.{i}.attn.q_norm.weight": "transformer/layers/block/attention/query_norm/scale",
    "blocks.{i}.attn.k_norm.weight": "transformer/layers/block/attention/key_norm/scale",
    "blocks.{i}.attn.proj.weight": "transformer/layers/block/attention/out/kernel",
    "blocks.{i}.attn.proj.bias": "transformer/layers/block/attention/out/bias",
    "blocks.{i}.norm2.weight": "transformer/layers/block/mlp_norm/scale",
    "blocks.{i}.mlp.w1.weight": "transformer/layers/block/mlp/gate/kernel",
    "blocks.{i}.mlp.w3.weight": "transformer/layers/block/mlp/up/kernel",
    "blocks.{i}.mlp.w2.weight": "transformer/layers/block/mlp/down/kernel",
    "blocks.{i}.adaLN_modulation.0.weight": "transformer/layers/block/modulation/kernel",
    "blocks.{i}.adaLN_modulation.0.bias": "transformer/layers/block/modulation/bias",
}
_PIXEL_DECODER = {
    "dec_net.cond_embed.weight": "decoder/condition/kernel",
    "dec_net.cond_embed.bias": "decoder/condition/bias",
    "dec_net.input_proj.weight": "decoder/in/kernel",
    "dec_net.input_proj.bias": "decoder/in/bias",
    "dec_net.res_blocks.{j}.in_ln.weight": "decoder/block_{j}/norm/scale",
    "dec_net.res_blocks.{j}.in_ln.bias": "decoder/block_{j}/norm/bias",
    "dec_net.res_blocks.{j}.mlp.0.weight": "decoder/block_{j}/in/kernel",
    "dec_net.res_blocks.{j}.mlp.0.bias": "decoder/block_{j}/in/bias",
    "dec_net.res_blocks.{j}.mlp.2.weight": "decoder/block_{j}/out/kernel",
    "dec_net.res_blocks.{j}.mlp.2.bias": "decoder/block_{j}/out/bias",
    "dec_net.res_blocks.{j}.adaLN_modulation.1.weight": "decoder/block_{j}/modulation/kernel",
    "dec_net.res_blocks.{j}.adaLN_modulation.1.bias": "decoder/block_{j}/modulation/bias",
    "dec_net.final_layer.linear.weight": "decoder/out/kernel",
    "dec_net.final_layer.linear.bias": "decoder/out/bias",
}

DECO = {**_QUERY, **_PATCH, **_TIME, **_LABEL, **_BLOCKS, **_PIXEL_DECODER}

DECO_TEXT = {
    "y_pos_embedding": "text_embedding/positions",
    **_PATCH,
    **_QUERY,
    **_TIME,
    "y_embedder.proj.weight": "text_embedding/in/kernel",
    "y_embedder.proj.bias": "text_embedding/in/bias",
    "y_embedder.norm.weight": "text_embedding/norm/scale",
    "blocks.{i}.norm1.weight": "transformer/layers/block/attention_norm/scale",
    "blocks.{i}.attn.qkv_x.weight": "transformer/layers/block/attention/qkv/kernel",
    "blocks.{i}.attn.kv_y.weight": "transformer/layers/block/attention/text_kv/kernel",
    "blocks.{i}.attn.q_norm.weight": "transformer/layers/block/attention/query_norm/scale",
    "blocks.{i}.attn.k_norm.weight": "transformer/layers/block/attention/key_norm/scale",
    "blocks.{i}.attn.proj.weight": "transformer/layers/block/attention/out/kernel",
    "blocks.{i}.attn.proj.bias": "transformer/layers/block/attention/out/bias",
    "blocks.{i}.norm2.weight": "transformer/layers/block/mlp_norm/scale",
    "blocks.{i}.mlp.w12.weight": "transformer/layers/block/mlp/in/kernel",
    "blocks.{i}.mlp.w3.weight": "transformer/layers/block/mlp/down/kernel",
    "blocks.{i}.adaLN_modulation.0.weight": "transformer/layers/block/modulation/kernel",
    "blocks.{i}.adaLN_modulation.0.bias": "transformer/layers/block/modulation/bias",
    **_PIXEL_DECODER,
    "text_refine_blocks.{t}.norm1.weight": "text/layers/block/attention_norm/scale",
    "text_refine_blocks.{t}.attn.qkv.weight": "text/layers/block/attention/qkv/kernel",
    "text_refine_blocks.{t}.attn.q_norm.weight": "text/layers/block/attention/query_norm/scale",
    "text_refine_blocks.{t}.attn.k_norm.weight": "text/layers/block/attention/key_norm/scale",
    "text_refine_blocks.{t}.attn.proj.weight": "text/layers/block/attention/out/kernel",
    "text_refine_blocks.{t}.attn.proj.bias": "text/layers/block/attention/out/bias",
    "text_refine_blocks.{t}.norm2.weight": "text/layers/block/mlp_norm/scale",
    "text_refine_blocks.{t}.mlp.w12.weight": "text/layers/block/mlp/in/kernel",
    "text_refine_blocks.{t}.mlp.w3.weight": "text/layers/block/mlp/down/kernel",
    "text_refine_blocks.{t}.adaLN_modulation.0.weight": "text/layers/block/modulation/kernel",
    "text_refine_blocks.{t}.adaLN_modulation.0.bias": "text/layers/block/modulation/bias",
}

BASELINE = {
    "x_embedder.proj.weight": "patch_embedding/kernel",
    "x_embedder.proj.bias": "patch_embedding/bias",
    **_TIME,
    **_LABEL,
    "final_layer.linear.weight": "out/kernel",
    "final_layer.linear.bias": "out/bias",
    "final_layer.adaLN_modulation.0.weight": "out_modulation/kernel",
    "final_layer.adaLN_modulation.0.bias": "out_modulation/bias",
    **_BLOCKS,
}

PIXNERD = {
    **_QUERY,
    **_PATCH,
    **_TIME,
    **_LABEL,
    "final_layer.norm.weight": "decoder/norm/scale",
    "final_layer.linear.weight": "decoder/out/kernel",
    "final_layer.linear.bias": "decoder/out/bias",
    **_BLOCKS,
    "blocks.{i+j}.param_generator1.0.weight": "decoder/block_{j}/generator/kernel",
    "blocks.{i+j}.param_generator1.0.bias": "decoder/block_{j}/generator/bias",
    "blocks.{i+j}.norm.weight": "decoder/block_{j}/norm/scale",
}

PROJECTOR = {
    "proj.0.0.weight": "in/kernel",
    "proj.0.0.bias": "in/bias",
    "proj.0.2.weight": "middle/kernel",
    "proj.0.2.bias": "middle/bias",
    "proj.0.4.weight": "out/kernel",
    "proj.0.4.bias": "out/bias",
}
