"""Reports of an evaluation: an HTML page, and pictures for papers and slides.

Door: `write.write_report`, and `options.with_report_figures` for the evaluator options that a
report turns on.
"""
