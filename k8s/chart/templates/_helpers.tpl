{{- define "kvtc.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of this release: our own labels, for the operator's may change with its version. */}}
{{- define "kvtc.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvtc.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "kvtc.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "kvtc.runtimeImage" -}}
{{- printf "%s:%s" .Values.runtime.repository .Values.runtime.tag -}}
{{- end -}}

{{/* The image that has, or gets, our package. */}}
{{- define "kvtc.image" -}}
{{- if eq .Values.install.mode "image" -}}
{{- printf "%s:%s" .Values.install.image.repository .Values.install.image.tag -}}
{{- else -}}
{{- include "kvtc.runtimeImage" . -}}
{{- end -}}
{{- end -}}

{{- define "kvtc.artifactClaim" -}}
{{- default (printf "%s-artifacts" (include "kvtc.fullname" .)) .Values.artifact.claim.existing -}}
{{- end -}}

{{- define "kvtc.needsArtifact" -}}
{{- if ne .Values.codec.profile "raw" -}}true{{- end -}}
{{- end -}}

{{/* Ratios to calibrate plans for: the one that is served with is always among them. */}}
{{- define "kvtc.ratios" -}}
{{- $ratios := .Values.calibration.ratios -}}
{{- if and .Values.codec.ratio (not (has .Values.codec.ratio $ratios)) -}}
{{- $ratios = append $ratios .Values.codec.ratio -}}
{{- end -}}
{{- join "," $ratios -}}
{{- end -}}

{{/* What the artifact depends on. Its hash names the Job and the alias of what the Job makes. */}}
{{- define "kvtc.calibrationInputs" -}}
{{- $inputs := pick .Values.calibration "texts" "textsClaim" "textsConfigMap" "tokens" "documentTokens" "maxKl" "sensitivity" "layersPerGroup" "seed" -}}
{{- $inputs = merge $inputs (dict "model" .Values.model.name "dtype" .Values.model.dtype "profile" .Values.codec.profile "ratios" (include "kvtc.ratios" .)) -}}
{{- toJson $inputs -}}
{{- end -}}

{{- define "kvtc.calibration" -}}
{{- include "kvtc.calibrationInputs" . | sha256sum | trunc 12 -}}
{{- end -}}

{{/* Whether workers open an endpoint of their own. */}}
{{- define "kvtc.ownEndpoint" -}}
{{- if eq .Values.monitoring.endpoint "own" -}}true{{- end -}}
{{- end -}}

{{/* A size such as 64GiB or 64Gi as a number of GiB. */}}
{{- define "kvtc.gib" -}}
{{- . | trimSuffix "GiB" | trimSuffix "Gi" | int64 -}}
{{- end -}}

{{/* Contradictions that a schema cannot see. Each says what to change. */}}
{{- define "kvtc.check" -}}
{{- $values := .Values -}}
{{- if and (include "kvtc.needsArtifact" .) (not $values.artifact.id) (not $values.calibration.enabled) -}}
{{- fail "no artifact: set artifact.id to one that is in the store, or calibration.enabled to true, or codec.profile to raw" -}}
{{- end -}}
{{- if and $values.calibration.textsClaim $values.calibration.textsConfigMap -}}
{{- fail "calibration texts come from calibration.textsClaim or calibration.textsConfigMap, not from both" -}}
{{- end -}}
{{- if and $values.calibration.texts (not $values.calibration.textsClaim) (not $values.calibration.textsConfigMap) -}}
{{- fail "calibration.texts names files of a volume: set calibration.textsClaim or calibration.textsConfigMap" -}}
{{- end -}}
{{- if and (or $values.calibration.textsClaim $values.calibration.textsConfigMap) (not $values.calibration.texts) -}}
{{- fail "calibration.texts is empty: name the files that the volume holds" -}}
{{- end -}}
{{- if and $values.codec.ratio $values.codec.max_kl -}}
{{- fail "codec.ratio and codec.max_kl both choose the plan: set one of them to null" -}}
{{- end -}}
{{- if and $values.codec.max_kl (not $values.artifact.id) (not (has $values.codec.max_kl $values.calibration.maxKl)) -}}
{{- fail "codec.max_kl is not among calibration.maxKl: add it there" -}}
{{- end -}}
{{- if not (or $values.tiers.host.enabled $values.tiers.disk.enabled) -}}
{{- fail "no tier: set tiers.host.enabled or tiers.disk.enabled to true" -}}
{{- end -}}
{{- if hasKey $values.config "tiers" -}}
{{- fail "config.tiers: tiers follow from the values under tiers, so that memory and volumes fit them" -}}
{{- end -}}
{{- if and (eq $values.codec.profile "raw") (or $values.codec.ratio $values.codec.max_kl) -}}
{{- fail "codec.profile raw has neither ratio nor max_kl: set codec.ratio to null" -}}
{{- end -}}
{{- $disk := $values.tiers.disk -}}
{{- if and $values.security.encryption.secret (not $disk.enabled) -}}
{{- fail "security.encryption is of the disk tier: set tiers.disk.enabled to true, or no secret" -}}
{{- end -}}
{{- if and $values.security.encryption.secret (not $values.security.encryption.keys) -}}
{{- fail "security.encryption.keys is empty: name the keys of the secret, the newest in front" -}}
{{- end -}}
{{- if $disk.enabled -}}
{{- if lt (include "kvtc.gib" $disk.volume.size | int64) (include "kvtc.gib" $disk.capacity | int64) -}}
{{- fail (printf "tiers.disk.volume.size (%s) is smaller than tiers.disk.capacity (%s); leave the file system 5 %% beyond it" $disk.volume.size $disk.capacity) -}}
{{- end -}}
{{- if and (eq $disk.volume.type "hostPath") (not $disk.volume.hostPath) -}}
{{- fail "tiers.disk.volume.type hostPath needs tiers.disk.volume.hostPath" -}}
{{- end -}}
{{- if and $disk.shared (ne $disk.volume.type "hostPath") -}}
{{- fail "tiers.disk.shared: only a folder of the node can be shared; set tiers.disk.volume.type to hostPath" -}}
{{- end -}}
{{- end -}}
{{- $role := ternary "prefill" "worker" (eq $values.mode "disaggregated") -}}
{{- $tiered := index $values $role -}}
{{- if gt (int64 $tiered.gpus) 1 -}}
{{- fail (printf "%s.gpus is %d: a worker with tiers has one GPU, for an artifact covers all KV heads; set it to 1" $role (int64 $tiered.gpus)) -}}
{{- end -}}
{{- $shared := include "kvtc.gib" $tiered.sharedMemorySize | int64 -}}
{{- $memory := include "kvtc.gib" $tiered.memory | int64 -}}
{{- $used := $shared -}}
{{- if $values.tiers.host.enabled -}}
{{- $used = add $used (include "kvtc.gib" $values.tiers.host.capacity | int64) -}}
{{- end -}}
{{- if eq $values.connector "kvbm" -}}
{{- $used = add $used (int64 $values.kvbm.cpuCacheGB) -}}
{{- end -}}
{{- if ge $used $memory -}}
{{- fail (printf "%s.memory (%s) does not hold /dev/shm, the host tier and the engine's own pool (%dGi) and the engine; `dynamo-kvtc plan` computes it" $role $tiered.memory $used) -}}
{{- end -}}
{{- if eq $values.connector "offloading" -}}
{{- if mod (int64 $values.offloading.chunkTokens) (int64 $values.model.blockSize) -}}
{{- fail "offloading.chunkTokens: make it a multiple of model.blockSize" -}}
{{- end -}}
{{- $needed := add 8 (div (add (mul 12 (int64 $values.offloading.poolGiB)) 9) 10) -}}
{{- if lt $shared $needed -}}
{{- fail (printf "%s.sharedMemorySize (%s) is too small for offloading.poolGiB: vLLM needs 1.2 times the pool and 8Gi, %dGi here" $role $tiered.sharedMemorySize $needed) -}}
{{- end -}}
{{- end -}}
{{- end -}}
