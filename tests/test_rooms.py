"""Do all imports in the package run downwards, from room to room, and do the documents say what is there?"""

import ast
import graphlib
import pathlib
import re

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
ARCHITECTURE = REPOSITORY / "docs/architecture.md"
# From the bottom up. A room is a folder or a module of the package; it may import from lower floors and from itself.
FLOORS = [
    ("errors", "version"),
    ("conditions", "diffusion", "export", "ops", "storage"),
    ("data", "models", "parallel", "weights"),
    ("encoders", "jobs", "sampling"),
    ("config", "metrics"),
    ("checkpoints",),
    ("pretrained",),
    ("preparation", "training"),
    ("generation", "planning", "porting"),
    ("demo", "evaluation", "reports"),
    ("cli",),
    ("__init__", "__main__"),
]


def find_modules(package):
    """{dotted name: file}; a package's name is that of its __init__.py."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def find_imports(name, modules):
    """The modules of ours that a module imports: at the top, in functions, under TYPE_CHECKING, or by a string."""
    path, found = modules[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, node.module] if node.module else above)
            # `from package import name` takes a module if there is one, else something that the package defines.
            wanted = [member if (member := f"{source}.{a.name}") in modules else source for a in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            wanted = [node.value.partition(":")[0]]  # "package.module:function", as the command line loads what it runs
        else:
            continue
        found.update(target for target in wanted if target in modules and target != name)
    return found


def find_problems(package, floors):
    """One line for every import that does not run downwards, every module without a room, and a circle of files."""
    modules, floor_of = find_modules(package), {room: k for k, rooms in enumerate(floors) for room in rooms}

    def room(name):
        return name.split(".")[1] if "." in name else "__init__"

    problems = [f"{name} stands in no room; name one in FLOORS" for name in modules if room(name) not in floor_of]
    empty = floor_of.keys() - {room(name) for name in modules}
    problems += [f"the room {name} has no module; take it out of FLOORS" for name in sorted(empty)]
    graph = {name: find_imports(name, modules) for name in modules}
    for name, targets in graph.items():
        for target in sorted(targets):
            here, there = room(name), room(target)
            if here != there and {here, there} <= floor_of.keys() and floor_of[here] <= floor_of[there]:
                way = "sideways" if floor_of[here] == floor_of[there] else "upwards"
                problems.append(f"{name} imports {target}: {way}, from {here} to {there}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        problems.append(f"a circle: {' ← '.join(error.args[1])}")
    return problems


def test_every_import_runs_downwards():
    """A circle or an import upwards is how the rooms grow together: move what is shared to a lower room instead."""
    problems = find_problems(REPOSITORY / "deco_jax", FLOORS)
    assert not problems, "\n" + "\n".join(problems)


def test_the_architecture_shows_these_floors():
    rows = re.findall(r"^\| (\d+) \| `(\w+)", ARCHITECTURE.read_text(), re.MULTILINE)
    documented = [(int(floor), room) for floor, room in rows]
    assert len(set(documented)) == len(documented), "a room stands there twice"
    assert sorted(documented) == sorted((floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms)


@pytest.mark.parametrize("document", ["architecture.md", "model.md"])
def test_documents_name_what_is_there(document):
    """`models/deco.py: DeCo` in these documents is a file, below the package or the repository, and a name in it."""
    named = re.findall(r"`([\w/.]+\.py)(?:: (\w+))?`", (REPOSITORY / "docs" / document).read_text())
    assert named
    for file, name in named:
        paths = [path for root in ("deco_jax", ".") if (path := REPOSITORY / root / file).is_file()]
        assert paths, f"{document} names {file}, which does not exist"
        assert not name or re.search(rf"^(class |def )?{name}\b", paths[0].read_text(), re.MULTILINE), (file, name)


def write_house(folder, files):
    """Writes {file: source} as a package `house` and returns its folder; __init__.py files come by themselves."""
    house = folder / "house"
    for name, source in files.items():
        path = house / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    for inside in {house, *(path.parent for path in house.rglob("*.py"))}:
        (inside / "__init__.py").touch()
    return house


HOUSE = [("ground",), ("left", "right"), ("roof",), ("__init__",)]
GOOD = {
    "ground.py": "import os",
    "left/one.py": "from house.ground import something",
    "left/two.py": "from house.left import one",
    "right/three.py": "from ..ground import something",
    "roof.py": "import house.left.two\nfrom house import right",
}


def test_a_house_in_order_has_no_problems(tmp_path):
    assert find_problems(write_house(tmp_path, GOOD), HOUSE) == []


@pytest.mark.parametrize(
    "file, source, problem",
    [
        ("ground.py", "import house.roof", "ground imports house.roof: upwards, from ground to roof"),
        ("ground.py", "def f():\n    from house.left import one", "ground imports house.left.one: upwards"),
        ("ground.py", "if TYPE_CHECKING:\n    from house.left.one import X", "ground imports house.left.one: upwards"),
        ("ground.py", "import_module('house.roof')", "ground imports house.roof: upwards"),
        ("ground.py", "load('house.left.one:main')", "ground imports house.left.one: upwards"),
        ("left/one.py", "from ..roof import x", "left.one imports house.roof: upwards, from left to roof"),
        (
            "left/one.py",
            "from ..right import three",
            "left.one imports house.right.three: sideways, from left to right",
        ),
        ("left/one.py", "from house.right import x", "left.one imports house.right: sideways, from left to right"),
        ("left/one.py", "from house import x", "left.one imports house: upwards, from left to __init__"),
        ("left/one.py", "from . import two", "a circle: house.left."),
        ("left/one.py", "from .two import x", "a circle: house.left."),
        ("garden.py", "", "house.garden stands in no room"),
    ],
)
def test_what_is_out_of_order_is_found(tmp_path, file, source, problem):
    """The checker itself. An import upwards may close a circle, too; that comes last."""
    first, *rest = find_problems(write_house(tmp_path, GOOD | {file: source}), HOUSE)
    assert problem in first and all("a circle: " in other for other in rest)


def test_a_package_may_gather_what_its_modules_define(tmp_path):
    files = GOOD | {"left/__init__.py": "from house.left.two import x"}
    assert find_problems(write_house(tmp_path, files), HOUSE) == []


def test_a_room_that_is_gone_is_found(tmp_path):
    assert find_problems(write_house(tmp_path, GOOD), [*HOUSE, ("cellar",)]) == [
        "the room cellar has no module; take it out of FLOORS"
    ]
