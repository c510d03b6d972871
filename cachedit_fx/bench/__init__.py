"""The measuring behind the commands: one run over many configurations, ours and others', on the same pictures.

    rows.py        which configurations: a TOML file's, the presets, the peers'
    prompts.py     which pictures
    systems.py     a pipeline with one cache switched on, whoever made the cache; draws, counts, takes the time
    scorers.py     CLIP score and ImageReward, if their weights are there
    process.py     the same in a process of its own, for peers that patch the pipeline's class (worker.py runs there)
    measure.py     groups of rows in, measured rows out
    run.py         rows into groups, groups into a record.py, which can be resumed; pages.py shows the record
    against.py     pairs of ours with cache-dit
    demo.py        the run behind `cachedit demo`

    overhead.py    what a step costs; cold.py: what a start costs; both on the model of flux.py
    coverage.py    which models the cache works with
    kernels_verify.py, kernels_bandwidth.py, kernels_numerics.py, flux_steps.py: for examples/gpu_check.py too

Nothing here imports a command, or is imported by the library. Progress goes to a `Tell` (progress.py), mistakes that a
user can mend are raised as errors.py has them.
"""
