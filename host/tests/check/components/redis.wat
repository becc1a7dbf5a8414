(component
  (import "stagehost:stage/redis@0.1.0" (instance))
  (component $handler-code)
  (instance $handler (instantiate $handler-code))
  (export "stagehost:stage/handler@0.1.0" (instance $handler))
)
