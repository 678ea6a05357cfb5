{{/* Our configuration file, as docs/configuration.md has it. */}}
{{- define "kvtc.config" -}}
{{- $tiers := list -}}
{{- if .Values.tiers.host.enabled -}}
{{- $tiers = append $tiers (dict "kind" "host" "capacity" .Values.tiers.host.capacity) -}}
{{- end -}}
{{- if .Values.tiers.disk.enabled -}}
{{- $disk := dict "kind" "disk" "path" .Values.tiers.disk.path "capacity" .Values.tiers.disk.capacity -}}
{{- if .Values.tiers.disk.shared -}}
{{- $_ := set $disk "shared" true -}}
{{- end -}}
{{- if .Values.security.encryption.secret -}}
{{- $keys := list -}}
{{- range .Values.security.encryption.keys -}}
{{- $keys = append $keys (dict "id" . "file" (printf "/etc/dynamo-kvtc-keys/%s" .)) -}}
{{- end -}}
{{- $_ := set $disk "encryption" (dict "keys" $keys) -}}
{{- end -}}
{{- $tiers = append $tiers $disk -}}
{{- end -}}
{{- $codec := dict -}}
{{- range $key, $value := .Values.codec -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $_ := set $codec $key $value -}}
{{- end -}}
{{- end -}}
{{- $config := dict "codec" $codec "tiers" $tiers -}}
{{- if include "kvtc.needsArtifact" . -}}
{{- $_ := set $config "artifact" "/run/dynamo-kvtc/artifact" -}}
{{- end -}}
{{- if include "kvtc.ownEndpoint" . -}}
{{- $_ := set $config "observability" (dict "metrics_port" (int64 .Values.monitoring.port) "metrics_address" "0.0.0.0") -}}
{{- end -}}
{{- $_ := mergeOverwrite $config (deepCopy .Values.config) -}}
{{- toYaml $config -}}
{{- end -}}

{{/* The value of --kv-transfer-config for a role: worker, prefill or decode. */}}
{{- define "kvtc.transferConfig" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $file := dict "config" "/etc/dynamo-kvtc/kvtc.yaml" -}}
{{- /* A block that a tier lost is recomputed; vLLM's default would fail the request. */ -}}
{{- $base := dict "kv_role" "kv_both" "kv_load_failure_policy" "recompute" -}}
{{- $nixl := merge (dict "kv_connector" "NixlConnector") $base -}}
{{- if eq $role "decode" -}}
{{- toJson $nixl -}}
{{- else -}}
{{- $own := deepCopy $base -}}
{{- $wrapper := merge (dict "kv_connector" "MultiConnector") $base -}}
{{- $order := "nixl first" -}}
{{- if eq $root.Values.connector "kvtc" -}}
{{- $_ := set $own "kv_connector" "KvtcConnector" -}}
{{- $_ := set $own "kv_connector_module_path" "dynamo_kvtc.adapters.vllm" -}}
{{- $_ := set $own "kv_connector_extra_config" $file -}}
{{- else if eq $root.Values.connector "offloading" -}}
{{- $tier := merge (dict "type" "KvtcTier" "module_path" "dynamo_kvtc.adapters.vllm_offloading" "attention_backend" $root.Values.offloading.attentionBackend "enable_kv_events" true) $file -}}
{{- $_ := set $own "kv_connector" "OffloadingConnector" -}}
{{- $_ := set $own "kv_connector_extra_config" (dict "spec_name" "TieringOffloadingSpec" "cpu_bytes_to_use" (mul (int64 $root.Values.offloading.poolGiB) 1073741824) "block_size" (int64 $root.Values.offloading.chunkTokens) "self_describing_kv_events" true "secondary_tiers" (list $tier)) -}}
{{- else -}}
{{- $_ := set $own "kv_connector" "DynamoConnector" -}}
{{- $_ := set $own "kv_connector_module_path" "dynamo_kvtc.adapters.kvbm" -}}
{{- $_ := set $own "kv_connector_extra_config" $file -}}
{{- $_ := set $wrapper "kv_connector" "PdConnector" -}}
{{- $_ := set $wrapper "kv_connector_module_path" "kvbm.vllm_integration.connector" -}}
{{- $order = "own first" -}}
{{- end -}}
{{- if eq $role "worker" -}}
{{- toJson $own -}}
{{- else -}}
{{- $children := ternary (list $own $nixl) (list $nixl $own) (eq $order "own first") -}}
{{- $_ := set $wrapper "kv_connector_extra_config" (dict "connectors" $children) -}}
{{- toJson $wrapper -}}
{{- end -}}
{{- end -}}
{{- end -}}
