"""The choice of experts made visible: metrics, logs, the report's page and plots."""
