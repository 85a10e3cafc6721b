"""The report of a merge to look at: a page, a picture and a model card.

`dam_report.json` is read into a typed model (`schema`). Pure functions turn it into numbers
(`summary`, `depth`), numbers into pictures and tables (`pictures`), and those into a page (`page`),
a figure (`figure`) and the model card (`card`).
"""
