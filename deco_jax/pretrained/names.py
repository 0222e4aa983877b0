"""Which of the PyTorch system's tensors is which of our parameters: one table for each network, read both ways.

Left stands the PyTorch name, right the path in our parameter tree; `weights/translate.py` says what the letters count.
"""


def _linear(theirs: str, ours: str, bias: bool = True) -> dict[str, str]:
    table = {f"{theirs}.weight": f"{ours}/kernel"}
    return table | {f"{theirs}.bias": f"{ours}/bias"} if bias else table


_TIME = {**_linear("t_embedder.mlp.0", "time_embedding/in"), **_linear("t_embedder.mlp.2", "time_embedding/out")}
_LABEL = {"y_embedder.embedding_table.weight": "label_embedding/table"}


def _block(theirs: str, ours: str, into_attention: dict[str, str], mlp: dict[str, str]) -> dict[str, str]:
    """A transformer block; what differs between blocks is given without the block's own name in front."""

    def inside(table: dict[str, str]) -> dict[str, str]:
        return {f"{theirs}.{their}": f"{ours}/{our}" for their, our in table.items()}

    return inside(
        {
            "norm1.weight": "attention_norm/scale",
            **into_attention,
            "attn.q_norm.weight": "attention/query_norm/scale",
            "attn.k_norm.weight": "attention/key_norm/scale",
            **_linear("attn.proj", "attention/out"),
            "norm2.weight": "mlp_norm/scale",
            **mlp,
            **_linear("adaLN_modulation.0", "modulation"),
        }
    )


_QKV = _linear("attn.qkv", "attention/qkv", bias=False)
_SWIGLU = {f"mlp.{w}.weight": f"mlp/{name}/kernel" for w, name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))}
_FUSED_SWIGLU = {"mlp.w12.weight": "mlp/in/kernel", "mlp.w3.weight": "mlp/down/kernel"}
_BLOCKS = _block("blocks.{i}", "transformer/layers/block", _QKV, _SWIGLU)
_PATCH = _linear("s_embedder.proj", "patch_embedding")
_QUERY = _linear("x_embedder.embedder.0", "decoder/query")
_PIXEL_DECODER = {
    **_linear("dec_net.cond_embed", "decoder/condition"),
    **_linear("dec_net.input_proj", "decoder/in"),
    "dec_net.res_blocks.{j}.in_ln.weight": "decoder/block_{j}/norm/scale",
    "dec_net.res_blocks.{j}.in_ln.bias": "decoder/block_{j}/norm/bias",
    **_linear("dec_net.res_blocks.{j}.mlp.0", "decoder/block_{j}/in"),
    **_linear("dec_net.res_blocks.{j}.mlp.2", "decoder/block_{j}/out"),
    **_linear("dec_net.res_blocks.{j}.adaLN_modulation.1", "decoder/block_{j}/modulation"),
    **_linear("dec_net.final_layer.linear", "decoder/out"),
}

# Each in the order of PyTorch's modules, by which its optimisers number the parameters.
DECO = {**_QUERY, **_PATCH, **_TIME, **_LABEL, **_BLOCKS, **_PIXEL_DECODER}

DECO_TEXT = {
    "y_pos_embedding": "text_embedding/positions",
    **_PATCH,
    **_QUERY,
    **_TIME,
    **_linear("y_embedder.proj", "text_embedding/in"),
    "y_embedder.norm.weight": "text_embedding/norm/scale",
    **_block(
        "blocks.{i}",
        "transformer/layers/block",
        {"attn.qkv_x.weight": "attention/qkv/kernel", "attn.kv_y.weight": "attention/text_kv/kernel"},
        _FUSED_SWIGLU,
    ),
    **_PIXEL_DECODER,
    **_block("text_refine_blocks.{t}", "text/layers/block", _QKV, _FUSED_SWIGLU),
}

BASELINE = {
    **_linear("x_embedder.proj", "patch_embedding"),
    **_TIME,
    **_LABEL,
    **_linear("final_layer.linear", "out"),
    **_linear("final_layer.adaLN_modulation.0", "out_modulation"),
    **_BLOCKS,
}

PIXNERD = {
    **_QUERY,
    **_PATCH,
    **_TIME,
    **_LABEL,
    "final_layer.norm.weight": "decoder/norm/scale",
    **_linear("final_layer.linear", "decoder/out"),
    **_BLOCKS,
    **_linear("blocks.{i+j}.param_generator1.0", "decoder/block_{j}/generator"),
    "blocks.{i+j}.norm.weight": "decoder/block_{j}/norm/scale",
}

PROJECTOR = {**_linear("proj.0.0", "in"), **_linear("proj.0.2", "middle"), **_linear("proj.0.4", "out")}
