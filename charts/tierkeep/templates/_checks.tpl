{{- /* What a schema cannot say: values that are right alone and wrong together. */}}
{{- define "tierkeep.check" -}}
{{- with .Values }}
{{- $own := list "/etc/tierkeep" "/run/tierkeep-control" }}
{{- $paths := list .ram.hostPath .disk.hostPath .socket.hostPath }}
{{- $names := list "ram.hostPath" "disk.hostPath" "socket.hostPath" }}
{{- range $i, $path := $paths }}
{{- range $j, $other := concat $paths $own }}
{{- if and (ne $i $j) (hasPrefix (printf "%s/" $other) (printf "%s/" $path)) }}
{{- fail (printf "%s: %s lies in %s, which has another use: each directory is for one thing" (index $names $i) $path $other) }}
{{- end }}
{{- end }}
{{- end }}
{{- if lt (include "tierkeep.bytes" .ram.bytes | int64) 67108864 }}
{{- fail (printf "ram.bytes: %s holds no training state; give 64Mi or more" .ram.bytes) }}
{{- end }}
{{- if eq .agent.identity "kubernetes" }}
{{- range .agent.buckets }}
{{- if not (contains "{namespace}" .) }}
{{- fail (printf "agent.buckets: %s has no {namespace} in it, so every namespace could write there with the agent's credentials; give it as in s3://models/{namespace}/" .) }}
{{- end }}
{{- end }}
{{- if not .agent.tokenKeys }}
{{- fail "agent.tokenKeys: with identity kubernetes the agent needs the keys that tokens are signed with" }}
{{- end }}
{{- end }}
{{- if ge (include "tierkeep.seconds" .agent.drainOnSigterm | int64) (.terminationGracePeriodSeconds | int64) }}
{{- fail (printf "agent.drainOnSigterm: the pod is killed %ds after SIGTERM (terminationGracePeriodSeconds), within the %s of the drain" (.terminationGracePeriodSeconds | int64) .agent.drainOnSigterm) }}
{{- end }}
{{- if and (eq .tls.mode "secret") (not .tls.secretName) .peers.enabled }}
{{- fail "tls.secretName: tls.mode is secret: name the Secret that has tls.crt, tls.key and ca.crt" }}
{{- end }}
{{- if and .devicePlugin.enabled (ne .agent.identity "kubernetes") }}
{{- fail "devicePlugin.enabled: with identity kernel the agent serves its own user alone; set agent.identity to kubernetes" }}
{{- end }}
{{- if and (not .serviceAccount.create) (not .serviceAccount.name) }}
{{- fail "serviceAccount.name: serviceAccount.create is false: name the one to use" }}
{{- end }}
{{- if and .accelerators.only .nodeAffinity }}
{{- fail "nodeAffinity: accelerators.only makes one of its own; set one of the two" }}
{{- end }}
{{- if and .accelerators.only (not .accelerators.labels) }}
{{- fail "accelerators.labels: accelerators.only is set, and no label tells which nodes have any" }}
{{- end }}
{{- if and .podMonitor.enabled .serviceMonitor.enabled }}
{{- fail "serviceMonitor.enabled: podMonitor is enabled too, and every sample would be taken twice; choose one" }}
{{- end }}
{{- $set := list "TIERKEEP_NODE" "TIERKEEP_ADVERTISE" "TIERKEEP_CONTROL" "TIERKEEP_LOG" "TIERKEEP_AGENT_CONFIG" "TIERKEEP_RAM_BYTES_MAX" }}
{{- range .extraEnv }}
{{- if has .name $set }}
{{- fail (printf "extraEnv: the chart sets %s itself" .name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
