"""Parameter trees by path: 'blocks/attention/q'."""

from collections.abc import Callable
from typing import Any


def path_name(path: tuple) -> str:
    """Join a JAX key path with slashes: (DictKey('blocks'), DictKey('q')) -> 'blocks/q'."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path)


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function gets the leaf's path name first."""
    import jax

    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Flatten `tree` to {path name: leaf}, in tree order."""
    import jax

    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
