"""The field's harness: lmms-eval's stock tasks on local files, its scores item by item beside ours."""
