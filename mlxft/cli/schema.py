"""mlxft schema."""

from __future__ import annotations

import click

from mlxft.text import echo, json_text


@click.command()
def schema() -> None:
    """Print the JSON schema of recipes: editors that read it complete and check YAML as it is typed.

    \b
    Example: mlxft schema > recipe.schema.json

    VS Code (with its YAML extension), Neovim, Helix and others that use yaml-language-server then need one line at the
    top of a recipe:

    \b
        # yaml-language-server: $schema=recipe.schema.json

    The shell completes commands, options and names of runs after one of:

    \b
        eval "$(_MLXFT_COMPLETE=bash_source mlxft)"            # in ~/.bashrc
        eval "$(_MLXFT_COMPLETE=zsh_source mlxft)"             # in ~/.zshrc
        _MLXFT_COMPLETE=fish_source mlxft | source             # in ~/.config/fish/config.fish
    """
    from mlxft.schema import recipe_schema

    echo(json_text(recipe_schema(), indent=2))
