"""The pipeline: flows that chain data and vae, tracked in MLflow; the only package that knows Prefect and MLflow."""
