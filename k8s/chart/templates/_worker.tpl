{{- define "kvtc.mounts" -}}
- name: config
  mountPath: /etc/dynamo-kvtc
  readOnly: true
{{- if ne .Values.install.mode "image" }}
- name: packages
  mountPath: /opt/dynamo-kvtc
{{- end }}
{{- if .Values.model.cacheClaim }}
- name: models
  mountPath: {{ .Values.model.cachePath }}
{{- end }}
{{- end -}}

{{/* Master keys: mounted where tiers are opened, and nowhere else. */}}
{{- define "kvtc.keyMount" -}}
{{- if .Values.security.encryption.secret -}}
- name: keys
  mountPath: /etc/dynamo-kvtc-keys
  readOnly: true
{{- end }}
{{- end -}}

{{- define "kvtc.keyVolume" -}}
{{- if .Values.security.encryption.secret -}}
- name: keys
  secret:
    secretName: {{ .Values.security.encryption.secret }}
    # With a group of the pod's own nobody else may read them; without one a user other than root could not.
    defaultMode: {{ if (.Values.podSecurityContext | default dict).fsGroup }}0440{{ else }}0444{{ end }}
    items:
    {{- range .Values.security.encryption.keys }}
    - key: {{ . | quote }}
      path: {{ . | quote }}
    {{- end }}
{{- end }}
{{- end -}}

{{- define "kvtc.volumes" -}}
- name: config
  configMap:
    name: {{ include "kvtc.fullname" . }}
{{- if ne .Values.install.mode "image" }}
- name: packages
  emptyDir:
    sizeLimit: 1Gi
{{- if .Values.install.wheelsClaim }}
- name: wheels
  persistentVolumeClaim:
    claimName: {{ .Values.install.wheelsClaim }}
    readOnly: true
{{- end }}
{{- end }}
{{- if .Values.model.cacheClaim }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.model.cacheClaim }}
{{- end }}
{{- end -}}

{{/* What every process that runs our code needs in its environment. */}}
{{- define "kvtc.env" -}}
- name: PYTHONHASHSEED
  value: "0"
{{- if ne .Values.install.mode "image" }}
- name: PYTHONPATH
  value: /opt/dynamo-kvtc
{{- end }}
{{- if .Values.model.cacheClaim }}
- name: HF_HOME
  value: {{ .Values.model.cachePath }}
{{- end }}
{{- if .Values.security.saltSecret }}
- name: DYNAMO_KVTC__SECURITY__SALT
  valueFrom:
    secretKeyRef:
      name: {{ .Values.security.saltSecret }}
      key: {{ .Values.security.saltKey }}
{{- end }}
{{- end -}}

{{- define "kvtc.envFrom" -}}
{{- if .Values.model.tokenSecret -}}
envFrom:
- secretRef:
    name: {{ .Values.model.tokenSecret }}
{{- end -}}
{{- end -}}

{{/* The init container that installs the wheel, where the image does not have it. */}}
{{- define "kvtc.installContainer" -}}
{{- if ne .Values.install.mode "image" -}}
- name: install
  image: {{ include "kvtc.runtimeImage" . }}
  imagePullPolicy: {{ .Values.imagePullPolicy }}
  command: [/bin/sh, /etc/dynamo-kvtc/install.sh]
  env:
  - name: TARGET
    value: /opt/dynamo-kvtc
  - name: PACKAGES
    value: {{ join "\n" .Values.install.packages | quote }}
  {{- if .Values.install.indexUrl }}
  - name: INDEX_URL
    value: {{ .Values.install.indexUrl | quote }}
  {{- end }}
  {{- if .Values.install.wheelsClaim }}
  - name: WHEELS
    value: /wheels
  {{- end }}
  volumeMounts:
  {{- include "kvtc.mounts" . | nindent 2 }}
  {{- if .Values.install.wheelsClaim }}
  - name: wheels
    mountPath: /wheels
    readOnly: true
  {{- end }}
{{- end -}}
{{- end -}}

{{/* One component of the graph that runs vLLM. Arguments: root, role, component name. */}}
{{- define "kvtc.worker" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $name := index . 2 -}}
{{- $values := $root.Values -}}
{{- $settings := index $values $role -}}
{{- $tiered := ne $role "decode" -}}
{{- $disk := and $tiered $values.tiers.disk.enabled -}}
{{- $artifact := and $tiered (include "kvtc.needsArtifact" $root) -}}
name: {{ $name }}
type: {{ $role }}
replicas: {{ $settings.replicas }}
runtimeVersionOverride: {{ $values.runtime.version | quote }}
sharedMemorySize: {{ $settings.sharedMemorySize }}
podTemplate:
  metadata:
    labels:
      {{- include "kvtc.selector" $root | nindent 6 }}
      app.kubernetes.io/component: {{ $role }}
    {{- if $tiered }}
    annotations:
      checksum/config: {{ include "kvtc.config" $root | sha256sum | trunc 16 }}
    {{- end }}
  spec:
    terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
    {{- with $values.priorityClassName }}
    priorityClassName: {{ . }}
    {{- end }}
    {{- with $values.imagePullSecrets }}
    imagePullSecrets:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $values.podSecurityContext }}
    securityContext:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $settings.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $settings.tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- if and $disk (eq $values.tiers.disk.volume.type "hostPath") (not $values.tiers.disk.shared) }}
    affinity:
      podAntiAffinity:
        requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "kvtc.selector" $root | nindent 14 }}
              app.kubernetes.io/component: {{ $role }}
    {{- end }}
    {{- if $tiered }}
    initContainers:
    {{- with include "kvtc.installContainer" $root }}
    {{- . | nindent 4 }}
    {{- end }}
    - name: prepare
      image: {{ include "kvtc.image" $root }}
      imagePullPolicy: {{ $values.imagePullPolicy }}
      command: [/bin/sh, /etc/dynamo-kvtc/prepare.sh]
      env:
      {{- include "kvtc.env" $root | nindent 6 }}
      {{- if $artifact }}
      - name: STORE
        value: /artifacts
      {{- if $values.artifact.id }}
      - name: ARTIFACT_ID
        value: {{ $values.artifact.id | quote }}
      {{- else }}
      - name: ARTIFACT_ALIAS
        value: {{ include "kvtc.calibration" $root | quote }}
      {{- end }}
      - name: WAIT_SECONDS
        value: {{ $values.artifact.waitSeconds | quote }}
      {{- end }}
      volumeMounts:
      {{- include "kvtc.mounts" $root | nindent 6 }}
      {{- if $artifact }}
      - name: artifacts
        mountPath: /artifacts
        readOnly: true
      - name: run
        mountPath: /run/dynamo-kvtc
      {{- end }}
    {{- end }}
    containers:
    - name: main
      image: {{ $tiered | ternary (include "kvtc.image" $root) (include "kvtc.runtimeImage" $root) }}
      imagePullPolicy: {{ $values.imagePullPolicy }}
      command: [python3, -m, dynamo.vllm]
      args:
      - --model
      - {{ $values.model.name | quote }}
      {{- with $values.model.servedName }}
      - --served-model-name
      - {{ . | quote }}
      {{- end }}
      {{- if $values.model.maxLength }}
      - --max-model-len
      - {{ $values.model.maxLength | int64 | quote }}
      {{- end }}
      - --dtype
      - {{ $values.model.dtype }}
      - --block-size
      - {{ $values.model.blockSize | quote }}
      - --gpu-memory-utilization
      - {{ $values.model.gpuMemoryUtilization | quote }}
      - --tensor-parallel-size
      - {{ $settings.gpus | quote }}
      {{- if ne $role "worker" }}
      - --disaggregation-mode
      - {{ $role }}
      {{- end }}
      - --kv-transfer-config
      - {{ include "kvtc.transferConfig" (list $root $role) | squote }}
      {{- if $tiered }}
      - --kv-events-config
      - '{"enable_kv_cache_events":true,"endpoint":"tcp://*:{{ $values.events.port }}","publisher":"zmq","topic":"kv-events"}'
      {{- end }}
      {{- if and $tiered (eq $values.connector "offloading") }}
      - --attention-backend
      - {{ $values.offloading.attentionBackend }}
      {{- end }}
      {{- range $settings.extraArgs }}
      - {{ . | quote }}
      {{- end }}
      env:
      {{- if $tiered }}
      {{- include "kvtc.env" $root | nindent 6 }}
      {{- else }}
      - name: PYTHONHASHSEED
        value: "0"
      {{- if $values.model.cacheClaim }}
      - name: HF_HOME
        value: {{ $values.model.cachePath }}
      {{- end }}
      {{- end }}
      - name: VLLM_NIXL_SIDE_CHANNEL_HOST
        valueFrom:
          fieldRef:
            fieldPath: status.podIP
      {{- if and $tiered (eq $values.connector "kvbm") }}
      - name: DYN_KVBM_CPU_CACHE_GB
        value: {{ $values.kvbm.cpuCacheGB | quote }}
      - name: DYN_KVBM_METRICS
        value: "true"
      - name: DYN_KVBM_METRICS_PORT
        value: "6880"
      {{- end }}
      {{- if $values.rdma.enabled }}
      {{- range $key, $value := $values.rdma.env }}
      - name: {{ $key }}
        value: {{ $value | quote }}
      {{- end }}
      {{- end }}
      {{- range $key, $value := $settings.env }}
      - name: {{ $key }}
        value: {{ $value | quote }}
      {{- end }}
      {{- with include "kvtc.envFrom" $root }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- $own := include "kvtc.ownEndpoint" $root }}
      {{- if and $tiered (or $own (eq $values.connector "kvbm")) }}
      ports:
      {{- if $own }}
      - name: kvtc
        containerPort: {{ $values.monitoring.port }}
      {{- end }}
      {{- if eq $values.connector "kvbm" }}
      - name: kvbm
        containerPort: 6880
      {{- end }}
      {{- end }}
      securityContext:
        capabilities:
          add: [IPC_LOCK]
      resources:
        requests:
          cpu: {{ $settings.cpu | quote }}
          memory: {{ $settings.memory }}
          nvidia.com/gpu: {{ $settings.gpus | quote }}
          {{- if $values.rdma.enabled }}
          {{ $values.rdma.resource }}: {{ $values.rdma.count | quote }}
          {{- end }}
        limits:
          memory: {{ $settings.memory }}
          nvidia.com/gpu: {{ $settings.gpus | quote }}
          {{- if $values.rdma.enabled }}
          {{ $values.rdma.resource }}: {{ $values.rdma.count | quote }}
          {{- end }}
      {{- if or $tiered $values.model.cacheClaim }}
      volumeMounts:
      {{- end }}
      {{- if $tiered }}
      {{- include "kvtc.mounts" $root | nindent 6 }}
      {{- if $artifact }}
      - name: artifacts
        mountPath: /artifacts
        readOnly: true
      - name: run
        mountPath: /run/dynamo-kvtc
        readOnly: true
      {{- end }}
      {{- if $disk }}
      - name: tier
        mountPath: {{ $values.tiers.disk.path }}
      {{- with include "kvtc.keyMount" $root }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- end }}
      {{- else if $values.model.cacheClaim }}
      - name: models
        mountPath: {{ $values.model.cachePath }}
      {{- end }}
    {{- if or $tiered $values.model.cacheClaim }}
    volumes:
    {{- end }}
    {{- if $tiered }}
    {{- include "kvtc.volumes" $root | nindent 4 }}
    {{- if $artifact }}
    - name: artifacts
      persistentVolumeClaim:
        claimName: {{ include "kvtc.artifactClaim" $root }}
    - name: run
      emptyDir: {}
    {{- end }}
    {{- if $disk }}
    - name: tier
      {{- $volume := $values.tiers.disk.volume }}
      {{- if eq $volume.type "ephemeral" }}
      ephemeral:
        volumeClaimTemplate:
          spec:
            accessModes: [ReadWriteOnce]
            {{- with $volume.storageClassName }}
            storageClassName: {{ . }}
            {{- end }}
            resources:
              requests:
                storage: {{ $volume.size }}
      {{- else if eq $volume.type "hostPath" }}
      hostPath:
        path: {{ $volume.hostPath }}
        type: DirectoryOrCreate
      {{- else }}
      emptyDir:
        sizeLimit: {{ $volume.size }}
      {{- end }}
    {{- with include "kvtc.keyVolume" $root }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- end }}
    {{- else if $values.model.cacheClaim }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ $values.model.cacheClaim }}
    {{- end }}
{{- end -}}
