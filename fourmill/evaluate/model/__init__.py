"""How good a trained 4M is out of the box: `fourmill evaluate model CHECKPOINT DATASET`.

    split.py        which samples training never saw; figures on the others are refused
    samples.py      samples of a dataset with inputs, labels, tokens and truth at their first crop
    constants.py, constant_boxes.py    the best that can be said without looking, fitted on training samples
    predictors.py   what the model says, decoded by the tokenizers that made its tokens; the round trip of labels
    forced.py       likelihoods of given tokens: loss, accuracy, how sure the model is of a box
    spread.py, spread_boxes.py         per-sample sums of each field's figures, for bootstrap intervals
    tallies.py, features.py            each modality's predictors against the same truth on the same samples
    run.py          the pass
    results.py, page.py, sheet.py      what it found: typed, as JSON, a table, HTML, a contact sheet

Invariant: every row of the table is taken on the same samples against the same truth by the same code as `fourmill
evaluate labels`; nothing that is fitted has seen one of them.
"""
