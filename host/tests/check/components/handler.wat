(component
  (import "wasi:io/poll@0.2.6" (instance))
  (import "stagehost:stage/types@0.1.0" (instance))
  (import "wasi:config/store@0.2.0-rc.1" (instance))
  (component $handler-code)
  (instance $handler (instantiate $handler-code))
  (export "stagehost:stage/handler@0.1.0" (instance $handler))
)
