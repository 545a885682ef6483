"""The pipeline: flows that chain data and vae; the only package that knows Prefect and MLflow."""
