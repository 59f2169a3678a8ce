"""The table of samplers read from their source, without importing them: `visar samplers` need not wait for torch.

A test holds it equal to `visar.samplers.registry.SAMPLERS`.
"""

from __future__ import annotations

import ast
from typing import Any

from visar.samplers.parameters import Parameter
from visar.samplers.registry import FOLDER, SamplerSpec, ordered


def catalogue() -> dict[str, SamplerSpec]:
    """The samplers of this folder by name, in the order of the table."""
    classes: dict[str, tuple[ast.ClassDef, str]] = {}
    choices: dict[str, tuple[str, ...]] = {}  # of the aliases of Literal
    for file in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node, f"visar.samplers.{file.stem}"
            elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
                assert isinstance(node.value, ast.Subscript)
                choices[ast.unparse(node.targets[0])] = ast.literal_eval(node.value.slice)

    def attributes(name: str) -> dict[str, ast.AnnAssign]:
        """The annotated attributes of a class that have a value, those of its bases first."""
        if name not in classes:
            return {}
        node = classes[name][0]
        own = {ast.unparse(a.target): a for a in node.body if isinstance(a, ast.AnnAssign) and a.value is not None}
        for base in node.bases:
            own = attributes(ast.unparse(base)) | own
        return own

    specs = []
    for node, module in classes.values():
        found = attributes(node.name)
        tokens, order = (
            ast.literal_eval(found[n].value) if n in found else usual  # type: ignore[arg-type]
            for n, usual in (("tokens", "discrete"), ("scan", "raster"))
        )
        for call in reversed(node.decorator_list):  # as they are applied
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != "register_sampler":
                continue
            told: dict[str, Any] = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
            exact, note, drafter = told.pop("exact", True), told.pop("note", ""), told.pop("drafter", None)
            name, paper, options = ast.literal_eval(call.args[0]), told.pop("paper"), {}
            for field, assigned in found.items():
                if isinstance(assigned.value, ast.Call) and ast.unparse(assigned.value.func) == "option":
                    default, *about = map(ast.literal_eval, assigned.value.args)
                    default = told.get(field, default)
                    said: dict[str, Any] = dict(zip(("help", "low", "high"), about, strict=False))
                    of = choices.get(ast.unparse(assigned.annotation), ())
                    options[field] = Parameter(field, type(default), default, choices=of, **said)
            specs.append(SamplerSpec(name, paper, tokens, exact, note, drafter, options, module, order))
    return {spec.name: spec for spec in ordered(specs)}
