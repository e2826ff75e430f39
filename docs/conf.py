"""The API reference: `make docs` builds it from the docstrings into build/docs."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # generated.py, and the tree's own mpisync

import mpisync  # noqa: E402

project = "mpisync"
copyright = "the mpisync developers"
version = release = mpisync.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
smartquotes_action = "D"  # dashes; quotes stay as they are, for "" is not a pair of curls
default_role = "py:obj"  # a name in backticks is a link where there is one

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Seconds": "ndarray", "Array": "ndarray", "ComputeTimes": "ComputeTimes"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes as a list, as arguments are; not one heading each.
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 76
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# Furo has its fonts, styles and scripts in itself: the pages fetch nothing.
html_theme = "furo"
html_title = f"mpisync {release}"
html_static_path = ["static"]
html_css_files = ["reference.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
