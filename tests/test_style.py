"""The repository keeps the house limits, and the checker finds what breaks them."""

import ast
import importlib.util
from pathlib import Path

import pytest

from jaxllm.data.cleaning.shape import MEASURES

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("check_style", ROOT / "tools" / "check_style.py")
check_style = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_style)


def test_repository_keeps_the_limits():
    problems = [problem for problem in check_style.check(ROOT) if not problem.warning]
    assert not problems, "\n".join(f"{p.path}:{p.line}: {p.rule}: {p.text}" for p in problems)


def test_undefined_names_are_found_and_axes_are_none(tmp_path):
    (tmp_path / "jaxllm").mkdir()
    (tmp_path / "jaxllm/a.py").write_text('def f(x: Float[Array, "T"]) -> int:\n    return Path(x)\n')
    found = [(p.line, p.text) for p in check_style.undefined(tmp_path)]
    assert found == [(1, "Undefined name `Float`"), (1, "Undefined name `Array`"), (2, "Undefined name `Path`")]
    assert not [*check_style.undefined(ROOT)]


def lines(code: str, count: int) -> str:
    return code + "\n" + "    x = 1\n" * count


BAD = {
    "file-length": {"jaxllm/core/a.py": "x = 1\n" * 401},
    "function-length": {"jaxllm/core/a.py": lines("def f():", 60)},
    "parameters": {"jaxllm/core/a.py": "def f(a, b, c, d, e, f, g, h, *, i):\n    pass\n"},
    "nesting": {
        "jaxllm/core/a.py": "def f():\n if 1:\n  for _ in x:\n   while 1:\n    with x:\n"
        "     try:\n      y\n     finally:\n      z\n"
    },
    "class-depth": {
        "jaxllm/layers/a.py": "class A(nnx.Module): pass\nclass B(A): pass\n",
        "jaxllm/layers/b.py": "class C(B): pass\n",
    },
    "library-length": {f"jaxllm/core/m{i}.py": "x = 1\n" * 390 for i in range(check_style.MAX_LIBRARY // 390 + 1)},
    "catch-all": {"jaxllm/core/a.py": "try:\n    x\nexcept (ValueError, Exception):\n    pass\n"},
    "module-name": {"jaxllm/data/text_utils.py": ""},
    "config-access": {"jaxllm/core/a.py": "x = getattr(self.config, 'lr', None)\n"},
    "todo": {"tools/a.py": "x = 1  # " + "TODO: later\n"},
}
BAD_IMPORTS = {
    "core may import nothing; not data.world": {"jaxllm/core/a.py": "import jaxllm.data.world.world\n"},
    "models may import core, sharding, layers; not hf": {
        "jaxllm/models/a.py": "def f():\n    from jaxllm.hf import x\n"
    },
    "not layers.masks": {
        "jaxllm/inference/a.py": "from jaxllm.layers.masks import mask\n",
        "jaxllm/layers/masks.py": "",
    },
    "not training.step": {
        "jaxllm/evaluation/a.py": "from jaxllm.training import losses, step\n",
        "jaxllm/training/losses.py": "",
        "jaxllm/training/step.py": "",
    },
    "not layers.attention": {"jaxllm/data/a.py": "from ..layers import attention\n", "jaxllm/layers/attention.py": ""},
    "torch is not a dependency": {"jaxllm/hf/a.py": "def f():\n    import torch.nn\n"},
    "layers never sees optax": {"jaxllm/layers/a.py": "import optax\n"},
    "jax only inside functions": {"jaxllm/data/a.py": "import jax.numpy as jnp\n"},
    "grain only inside functions": {"jaxllm/train.py": "import grain\ndef main(): pass\n"},
    "jaxllm.train is a command": {
        "jaxllm/tune.py": "from jaxllm import train\n",
        "jaxllm/train.py": "def main(): pass\n",
    },
    "--help imports jaxllm.train -> jaxllm.recipe -> jax": {
        "jaxllm/train.py": "from jaxllm import recipe\ndef main(): pass\n",
        "jaxllm/recipe.py": "from jaxtyping import Array\n",
    },
}
GOOD = {
    "jaxllm/__init__.py": "",
    "jaxllm/core/a.py": lines('def f():\n    """Doc.\n\n    More.\n    """\n\n    # why', 58) + "    import jax\n",
    "jaxllm/core/config.py": "class Config(BaseModel): pass\nclass Loop(Config): pass\n",
    "jaxllm/core/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\n",
    "jaxllm/core/c.py": "def f(self, a, b, c, d, e, f, g, h): pass\n",
    "jaxllm/core/d.py": "def f():\n" + "".join(f"    {'el' * (i > 0)}if x == {i}:\n        pass\n" for i in range(9)),
    "jaxllm/evaluation/a.py": "from jaxllm.training import losses\nfrom jaxllm.data import chat\n",
    "jaxllm/inference/a.py": "import jax\nfrom jaxllm.layers import cache\nfrom . import b\n",
    "jaxllm/inference/b.py": "# TODO #12: faster\n",
    "jaxllm/layers/cache.py": "class Cache(nnx.Module): pass\nclass Ring(Cache): pass\n",
    "jaxllm/training/losses.py": "",
    "jaxllm/recipe.py": "import jax\nfrom jaxllm.training import losses\n",
    "jaxllm/train.py": "def main():\n    from jaxllm import recipe\n",
    "jaxllm/data/chat.py": "from jaxllm.core import config\nx = getattr(config, name)\n",
}


def problems(tmp_path: Path, files: dict[str, str]) -> list:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return check_style.check(tmp_path)


def test_good_examples_pass(tmp_path):
    assert problems(tmp_path, GOOD) == []


@pytest.mark.parametrize("rule", BAD)
def test_bad_example_is_found(tmp_path, rule):
    assert [problem.rule for problem in problems(tmp_path, BAD[rule]) if not problem.warning] == [rule]


@pytest.mark.parametrize("text", BAD_IMPORTS)
def test_bad_import_is_found(tmp_path, text):
    found = problems(tmp_path, BAD_IMPORTS[text])
    assert [problem.rule for problem in found] == ["import"]
    assert text in found[0].text


def test_output_and_exit_status(tmp_path, capsys):
    problems(tmp_path, {"jaxllm/core/a.py": "\ntry:\n    3\nexcept:\n    pass\n", "tests/b.py": "x = 1\n" * 301})
    capsys.readouterr()
    assert check_style.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "1 library files, 5 lines (limit 25289), median 5",
        "jaxllm/core/a.py:4: catch-all: name the errors that are expected",
        "tests/b.py:301: warning: file-length: 301 lines, limit 300",
    ]
    (tmp_path / "jaxllm/core/a.py").write_text("")
    assert check_style.main([str(tmp_path)]) == 0


# ---- every field of every config has a description and a reader


def sources() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sorted((ROOT / "jaxllm").rglob("*.py"))]


def config_classes(trees: list[ast.Module]) -> list[ast.ClassDef]:
    classes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return [node for node in classes if any(ast.unparse(base).split(".")[-1] == "Config" for base in node.bases)]


def fields(config: ast.ClassDef) -> list[ast.AnnAssign]:
    assigned = (node for node in config.body if isinstance(node, ast.AnnAssign))
    return [node for node in assigned if node.target.id != "kind" and "ClassVar" not in ast.unparse(node.annotation)]


def read_names(node: ast.AST) -> set[str]:
    """Attribute names below `node`; a validator only checks, so what it reads does not count."""
    if isinstance(node, ast.FunctionDef) and any("validator" in ast.unparse(mark) for mark in node.decorator_list):
        return set()
    own = {node.attr} if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else set()
    return own.union(*(read_names(child) for child in ast.iter_child_nodes(node)))


def test_every_field_has_a_description():
    missing = [
        f"{config.name}.{field.target.id}"
        for config in config_classes(sources())
        for field in fields(config)
        if not (isinstance(field.value, ast.Call) and any(key.arg == "description" for key in field.value.keywords))
    ]
    assert not missing, f"no Field(description=...): {', '.join(missing)}"


def test_every_field_has_a_reader():
    trees = sources()
    read = set().union(*(read_names(tree) for tree in trees))
    read |= {f"{end}_{measure}" for end in ("min", "max") for measure in MEASURES}  # QualityConfig.failed
    read.add("preset")  # CleanConfig fills in what it stands for
    unread = [
        f"{config.name}.{field.target.id}"
        for config in config_classes(trees)
        for field in fields(config)
        if field.target.id not in read
    ]
    assert not unread, f"fields that nothing reads: {', '.join(unread)}"


def test_the_two_tests_above_can_fail():
    tree = ast.parse(
        "class A(Config):\n"
        "    kind: Literal['a'] = 'a'\n"
        "    used: int = 1\n"
        "    checked: int = 1\n"
        "    @model_validator(mode='after')\n"
        "    def _check(self): return self.checked\n"
        "def f(a): return a.used\n"
    )
    (config,) = config_classes([tree])
    assert [field.target.id for field in fields(config)] == ["used", "checked"]
    assert "used" in read_names(tree)
    assert "checked" not in read_names(tree)
