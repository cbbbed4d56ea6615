"""The blind human study of Table 6: which of two images of a subject is the better one?

``python -m subject_driven_t2i.human_study serve`` makes a study from two finished runs of every subject and serves its
page; ``export`` writes the votes as CSV, for the analysis. A study is a folder of its own:

    runs/subject_driven_t2i/<scale>/human_study/<name>/
        study.json      the design: which images are compared, from which runs, the attention checks, the seed
        images/         copies of the images, all encoded alike, under names that say nothing
        votes.sqlite    raters, the order and sides in which each of them sees the pairs, votes
        votes.csv       written by ``export``: a line a vote, in terms of the methods

Raters are blind: neither the page nor an address, a header or a file name says which method drew an image. Both images
of a pair started from the same noise. The order of the pairs and the sides are shuffled for every rater.

    runs.py      two finished runs a subject -> the images that can be compared
    design.py    draws a study: pairs and attention checks
    study.py     what a study is, and the order that each rater sees
    pictures.py  copies of images that are treated alike
    store.py     votes in SQLite
    server.py    the pages; templates/ and static/ have all that they are made of
    export.py    votes.csv
"""
