"""What stands behind `cachedit bench`: one run over many configurations, ours and others', on the same pictures.

    rows.py        which configurations: a TOML file's, the presets, the peers'
    systems.py     a pipeline with one cache switched on, whoever made it; draws, counts, takes the time
    process.py     the same in a process of its own, for peers that patch the pipeline's class (worker.py runs there)
    prompts.py     what is drawn
    measure.py     rows in, measured rows out
    report.py      JSON, a table, a plot

Nothing here is imported by the library itself.
"""
