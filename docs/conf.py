"""Settings of Sphinx for the book (`make book`)."""

project = "prunekit"
extensions = ["myst_nb"]
html_theme = "furo"
html_static_path = html_css_files = ["book.css"]  # beside this file
html_title = "prunekit"
html_copy_source = False
html_show_copyright = False
nb_execution_mode = "off"  # the tour executed them
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# Headings of a notebook may begin at any level; what a widget is instead of stands beside it as a picture.
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
