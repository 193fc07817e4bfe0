{{- define "tierkeep.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "tierkeep.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- $name := include "tierkeep.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- $full | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* What lies outside namespaces has the namespace in its name: two releases do not meet there. */}}
{{- define "tierkeep.clusterwide" -}}
{{- printf "%s-%s" .Release.Namespace (include "tierkeep.fullname" .) | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "tierkeep.selector" -}}
app.kubernetes.io/name: {{ include "tierkeep.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: agent
{{- end }}

{{- define "tierkeep.labels" -}}
{{ include "tierkeep.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "tierkeep.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tierkeep.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "tierkeep.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "tierkeep.priorityClass" -}}
{{- if .Values.priorityClass.create }}
{{- .Values.priorityClass.name | default (include "tierkeep.clusterwide" .) }}
{{- else }}
{{- .Values.priorityClass.name }}
{{- end }}
{{- end }}

{{- define "tierkeep.keySecret" -}}
{{- .Values.clusterKey.existingSecret | default (printf "%s-cluster" (include "tierkeep.fullname" .)) }}
{{- end }}

{{- define "tierkeep.tlsSecret" -}}
{{- if eq .Values.tls.mode "secret" }}
{{- .Values.tls.secretName }}
{{- else }}
{{- .Values.tls.secretName | default (printf "%s-tls" (include "tierkeep.fullname" .)) }}
{{- end }}
{{- end }}

{{- /* 64Gi -> 68719476736 */}}
{{- define "tierkeep.bytes" -}}
{{- $number := regexFind "^[0-9]+" . | int64 }}
{{- $unit := regexFind "[KMGT]i$" . }}
{{- $powers := dict "Ki" 1 "Mi" 2 "Gi" 3 "Ti" 4 }}
{{- range until (get $powers $unit) }}
{{- $number = mul $number 1024 }}
{{- end }}
{{- $number }}
{{- end }}

{{- /* Request and limit: the RAM tier's pages are charged to the agent, which made them; 256Mi are for its
       own code, its buffers on the way to disk, peers and buckets, and its threads. */}}
{{- define "tierkeep.memory" -}}
{{- $sum := add (include "tierkeep.bytes" .Values.ram.bytes | int64) (mul 256 1024 1024) }}
{{- if mod $sum 1048576 }}{{ $sum }}{{ else }}{{ printf "%dMi" (div $sum 1048576) }}{{ end }}
{{- end }}

{{- /* 90s, 2m, 1h -> seconds */}}
{{- define "tierkeep.seconds" -}}
{{- $units := dict "ms" 0 "s" 1 "m" 60 "h" 3600 }}
{{- mul (regexFind "^[0-9]+" . | int64) (get $units (regexFind "[a-z]+$" .)) }}
{{- end }}

{{- /* A name that has the addresses of all agents. */}}
{{- define "tierkeep.seed" -}}
{{ printf "%s.%s.svc:9178" (include "tierkeep.fullname" .) .Release.Namespace }}
{{- end }}

{{- define "tierkeep.control" -}}
/run/tierkeep-control/control.sock
{{- end }}

{{- define "tierkeep.seLinuxOptions" -}}
{{- if .Values.seLinuxOptions }}
{{- toYaml .Values.seLinuxOptions }}
{{- else if .Values.openshift.enabled }}
{{- /* container_t may not touch the host's directories, whoever owns them. */ -}}
type: spc_t
{{- end }}
{{- end }}

{{- /* Whether the agent asks the API server: for its Node, or for the keys that trainers' tokens are signed
       with. */}}
{{- define "tierkeep.asksServer" -}}
{{- $keys := and (eq .Values.agent.identity "kubernetes") (hasPrefix "https://" .Values.agent.tokenKeys) }}
{{- if or $keys .Values.node.watch -}}
true
{{- end }}
{{- end }}
