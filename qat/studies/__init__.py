"""Studies: many runs that together answer a question.

    cells (which runs, and how they come about) -> measures (what each measured) -> contrasts (effects and verdicts)
    -> page (Markdown, JSON and a picture)

`factorial` crosses the paper's factors, `audit` throws the switches of what its released code did otherwise, and
`decide` takes of both the cells that claims need. Without training: `ptq`, `replay`, `sensitivity`.
"""
