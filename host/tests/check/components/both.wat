(component
  (component $handler-code)
  (instance $handler (instantiate $handler-code))
  (export "stagehost:stage/handler@0.1.0" (instance $handler))
  (component $batch-handler-code)
  (instance $batch-handler (instantiate $batch-handler-code))
  (export "stagehost:stage/batch-handler@0.1.0" (instance $batch-handler))
)
