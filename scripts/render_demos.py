"""Render demonstrations again: `python scripts/render_demos.py SOURCE NEW frame_size=128 rendering=fast`."""

from vega_policy.cli.render import render

if __name__ == "__main__":
    render.main()
